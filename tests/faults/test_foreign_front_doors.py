"""Clients that try to steer requests where the front door is not ours, and removes nothing of what they send."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
import yaml

from dp_extproc import contract
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc, http_filters, load_gateway
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from faults.trap import Trap

CHAT: Final = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
STRIPPED: Final = ("x-dp-", "x-override-", "x-data-parallel-rank")
ATTEMPTS: Final = 6
"""Lies of each kind; half as many failures eject a server."""
LEAVES: Final = "envoy.filters.http.header_mutation"
"""The filter of the shipped example that removes the clients' headers."""


@dataclass(frozen=True)
class Fleet:
    """Two servers behind somebody's front door."""

    workers: Sequence[HostedEngine]
    service: ServiceProcess
    client: httpx.Client

    def blames(self) -> list[str]:
        """Give what the service's metrics tell of failures."""
        page = self.service.metrics()
        assert "# TYPE dp_extproc_endpoint_ejected" in page
        told = ("dp_extproc_endpoint_ejected{", "dp_extproc_leg_failures_total{")
        return [line for line in page.splitlines() if line.startswith(told) and not line.endswith(" 0.0")]

    def received(self) -> list[dict[str, Any]]:
        return [request for worker in self.workers for request in worker.requests()]


def lies(victim: str, trap: str) -> dict[str, str]:
    """Give every header that means something inside: with the address of a trap, or that of a server to be ejected."""
    return {
        **dict.fromkeys(contract.SET_INSIDE, trap),
        contract.AVOID: f"-,{victim},cut",
        contract.FAILED: f"-,{victim},cut",
        contract.RETRY: "1",
        contract.LEG: "1",
        contract.STAGE: contract.FIRST_EVENT,
        contract.WATCH: "1",
        contract.DESTINATION: trap,
        "x-override-rid": "intruder",
        "x-override-routed-dp-rank": "1",
        "x-data-parallel-rank": "1",
        "x-envoy-original-dst-host": trap,
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-retry-on": "5xx",
    }


@pytest.fixture
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()


def run(running: ExitStack, protocol: str, **sections: Any) -> tuple[Sequence[HostedEngine], ServiceProcess]:
    engines = HostedEngines()
    workers = [engines.add("--dp-size", "2", *FAST) for _ in range(2)]
    running.enter_context(engines)
    pool = {"models": ["*"], "workers": {"endpoints": [each.url for each in workers]}}
    service = running.enter_context(ServiceProcess({**write_config([pool], **sections), "protocol": protocol}))
    service.wait_until_fresh()
    return workers, service


@pytest.fixture(params=["FULL_DUPLEX_STREAMED", "BUFFERED"])
def picked(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A gateway that speaks the endpoint-picker protocol, removes nothing, and makes metadata of clients' headers."""
    with ExitStack() as running:
        workers, service = run(running, "endpoint_picker")
        gateway = load_gateway(service.config, [each.port for each in workers])
        filters = http_filters(gateway)
        filters[:] = [each for each in filters if each["name"] != LEAVES]
        settings = ext_proc(gateway)
        settings["processing_mode"]["request_body_mode"] = request.param
        settings["grpc_service"]["initial_metadata"] = [
            {"key": name, "value": f"%REQ({name})%"} for name in (contract.LEG, contract.STAGE, contract.OWNER)
        ]
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=yaml.safe_dump(gateway)))
        yield Fleet(workers, service, running.enter_context(loopback.client(envoy.url)))


@pytest.fixture(params=[1, 3], ids=["without retries", "with retries"])
def routed(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The printed configuration behind a listener that removes nothing."""
    with ExitStack() as running:
        workers, service = run(running, "envoy", retry={"attempts": request.param})
        bootstrap = yaml.safe_load(render_yaml(build_bootstrap(service.config)))
        front_door = bootstrap["static_resources"]["listeners"][0]
        del front_door["filter_chains"][0]["filters"][0]["typed_config"]["early_header_mutation_extensions"]
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=yaml.safe_dump(bootstrap)))
        yield Fleet(workers, service, running.enter_context(loopback.client(envoy.url)))


def attack(fleet: Fleet, trap: Trap, paths: Sequence[tuple[str, str]]) -> None:
    """Send requests that lie of each server in turn, and see that each was served like any other."""
    for worker in fleet.workers:
        headers = lies(worker.url.removeprefix("http://"), trap.address)
        for method, path in [("POST", "/v1/chat/completions")] * ATTEMPTS + list(paths):
            answer = fleet.client.request(method, path, json=CHAT if method == "POST" else None, headers=headers)
            assert answer.status_code in {200, 400}, answer.text  # of what is no chat the stand-in knows nothing
            assert not {name for name in answer.headers if name.startswith("x-dp-")}
    fleet.service.wait_until_idle()

    assert trap.visits == 0
    assert fleet.blames() == []
    received = fleet.received()
    chats = [each for each in received if each["path"] == "/v1/chat/completions"]
    assert len(chats) == ATTEMPTS * len(fleet.workers)
    assert [name for each in received for name in each["headers"] if name.startswith(STRIPPED)] == []


def test_no_client_steers_behind_a_gateway_of_others(picked: Fleet, trap: Trap) -> None:
    """Nothing is believed there, and nothing of it reaches an engine, also of what is passed on unread."""
    attack(picked, trap, [("POST", "/v1/embeddings"), ("GET", "/health"), ("GET", "/v1/models")])

    addresses = {each.url.removeprefix("http://") for each in picked.workers}
    assert {each["headers"][contract.DESTINATION] for each in picked.received()} <= addresses


def test_no_client_steers_behind_another_listener(routed: Fleet, trap: Trap) -> None:
    """The way to the place where requests are placed removes once more what only the router may set."""
    attack(routed, trap, [("GET", "/health")])
