"""A rollout from one revision to another whose engines must not meet, through real Envoy and under load."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.load import SHORT, STREAMS, under_load
from e2e.stack import FAST
from patience import wait_for

REQUESTS = 400
ROLES = ("prefill", "decode")


@dataclass
class Rollout:
    """Engines of two revisions, of which the configuration lists those of some roles."""

    engines: dict[str, dict[str, EngineProcess]]
    """By group and role. With ``--page-size 1`` and ``2``, a decode engine of the other group would end itself."""
    content: dict[str, Any]
    service: ServiceProcess
    envoy: EnvoyProcess
    client: httpx.Client

    def use(self, v1: Sequence[str], v2: Sequence[str], weight: str | None = None) -> None:
        """Write the endpoints of these roles and the weight of v2 to the file, and wait until they are in use."""
        weights = {} if weight is None else {"v2": weight}
        self.content["pools"] = [pool_of(self.engines, {"v1": v1, "v2": v2}, weights)]
        self.service.write(yaml.safe_dump(self.content))
        before = self.service.log().count("is in use as it is now")
        self.service.send_signal(signal.SIGHUP)
        wait_for(lambda: self.service.log().count("is in use as it is now") > before)
        self.service.wait_until_fresh()

    def served(self, requests: int = REQUESTS) -> dict[str, int]:
        """Send some requests, and count how many the decode engine of each group has answered."""
        for group in self.engines.values():
            group["decode"].forget()
        with ThreadPoolExecutor(8) as threads:
            sent = [threads.submit(self.client.post, "/generate", json=SHORT) for _ in range(requests)]
            assert {each.result().status_code for each in sent} == {200}
        return {name: len(group["decode"].requests()) for name, group in self.engines.items()}

    def groups(self) -> dict[str, tuple[float | None, bool]]:
        """Return weight and completeness of each group, as the service shows them."""
        return {each["group"]: (each["weight"], each["complete"]) for each in self.service.loads()["groups"]}

    def counted(self, group: str) -> float:
        """Return how many requests the service has counted for a group."""
        name = f'dp_extproc_group_requests_total{{group="{group}",pool="*"}} '
        return next(float(line.removeprefix(name)) for line in self.service.metrics().splitlines() if name in line)


def pool_of(
    engines: dict[str, dict[str, EngineProcess]], roles: dict[str, Sequence[str]], weights: dict[str, str]
) -> dict[str, Any]:
    return {
        "models": ["*"],
        "groups": {"weights": weights},
        **{
            role: {
                "endpoints": [
                    {"url": engines[group][role].url, "group": group} for group in engines if role in roles[group]
                ]
            }
            for role in ROLES
        },
    }


@pytest.fixture(scope="module")
def running_engines() -> Iterator[Rollout]:
    with ExitStack() as running:
        engines = {
            group: {role: EngineProcess(role, 2, "--dp-attention", *FAST, "--page-size", pages) for role in ROLES}
            for group, pages in (("v1", "1"), ("v2", "2"))
        }
        every = [engine for group in engines.values() for engine in group.values()]
        for engine in every:
            running.push(engine)
            engine.start()
        for engine in every:
            engine.wait_until_listening()
        content = write_config([pool_of(engines, {"v1": ROLES, "v2": ()}, {})])
        service = running.enter_context(ServiceProcess(content))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        service.wait_until_ready()
        client = running.enter_context(loopback.client(envoy.url, timeout=60))
        yield Rollout(engines, content, service, envoy, client)


@pytest.fixture
def rollout(running_engines: Rollout) -> Iterator[Rollout]:
    """Begin with v1 alone. At the end every engine runs: no request was sent to a pair of both revisions."""
    running_engines.use(ROLES, ())
    running_engines.service.wait_until_ready()
    yield running_engines
    running_engines.service.wait_until_idle()
    assert all(engine.is_running for group in running_engines.engines.values() for engine in group.values())


def test_canary_gets_its_share_of_some_hundred_requests(rollout: Rollout) -> None:
    """The share holds to a few requests, and the page, the metric and the engines agree."""
    rollout.use(ROLES, ROLES, "5%")
    before = rollout.counted("v2")
    served = rollout.served()

    assert served["v2"] == pytest.approx(0.05 * REQUESTS, abs=4)
    assert served["v1"] + served["v2"] == REQUESTS
    assert rollout.counted("v2") - before == served["v2"]
    assert rollout.groups() == {"v1": (None, True), "v2": (0.05, True)}
    reasons = {pair["reason"] for pair in rollout.service.loads()["excluded_pairs"]}
    assert reasons == {"group is v1 on prefill and v2 on decode", "group is v2 on prefill and v1 on decode"}

    rollout.engines["v2"]["decode"].fault(inference="reset")
    assert rollout.served(100)["v1"] == 100, "the others serve what the canary fails"
    rollout.engines["v2"]["decode"].heal()


def test_no_request_fails_in_a_rollout(rollout: Rollout) -> None:
    """Step by step from v1 to v2, one role first in both directions; streams of removed engines end as they should."""
    served, log_before = [], len(rollout.service.log())

    def roll_out() -> None:
        rollout.use(ROLES, ("prefill",), "5%")
        assert rollout.groups() == {"v1": (None, True), "v2": (0.05, False)}
        for weight in ("5%", "50%", "100%"):
            rollout.use(ROLES, ROLES, weight)
            served.append(rollout.served(100)["v2"])
        rollout.use(("decode",), ROLES, "100%")
        assert rollout.groups() == {"v1": (None, False), "v2": (1.0, True)}
        rollout.use((), ROLES)

    load = under_load(rollout.envoy.url, roll_out)

    assert set(load.statuses) == {200}
    assert load.statuses.total() > 50
    assert load.ends == {"data: [DONE]": STREAMS}
    assert served == sorted(served)
    log = rollout.service.log()[log_before:]
    lines = ["group v2 is complete", "group v1 has no pair of prefill and decode any more"]
    assert [log.count(line) for line in lines] == [1, 1]
    assert "page_size_differs" not in log


def test_service_is_not_ready_with_one_role_of_each_revision(rollout: Rollout) -> None:
    """A load balancer must not send requests that no pair can serve; a client gets the reason."""
    rollout.use(("prefill",), ("decode",))
    wait_for(lambda: httpx.get(f"{rollout.service.admin_url}/readyz", trust_env=False).status_code == 503)
    answer = rollout.client.post("/generate", json=SHORT)

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_compatible_pair"
    assert "group is v1 on prefill and v2 on decode" in answer.json()["error"]["message"]
    rollout.use(ROLES, ROLES)
    rollout.service.wait_until_ready()
