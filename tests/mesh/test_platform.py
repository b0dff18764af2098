"""The parts, joined to the bootstrap of a platform team by the steps of the page, serve the fleet and change no other.

The fleet has strict engines. The neighbour is another virtual host of the same listener.
"""

import dataclasses
import json
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Final

import httpx
import pytest
import yaml

from dp_extproc.config import Config, parse_config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import write_config
from e2e.stack import FAST
from faults.decoy import Decoy
from faults.fleet import BODIES, Fleet, Outcome, ask, run_fleet
from faults.test_other_front_doors import forged_headers
from mesh.platform import LLM, SHOP, Certificate, Servers, client_of, join, read_bootstrap, run_servers, token
from patience import wait_for

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
SETTINGS: Final[dict[str, Any]] = {
    "envoy": {"max_body_bytes": 33 << 20},
    "retry": {"attempts": 3, "budget": 1.0},
    # Requests have to meet every fault, so no endpoint may be ejected; ejection has its own tests.
    "outlier_detection": {"consecutive_failures": 1000},
}
OURS: Final = ("x-dp-", "x-override-", "x-data-parallel-rank", "x-envoy-")
"""Beginnings of the headers that no engine may get from a client."""

FORGED: Final = forged_headers("127.0.0.1:1", "127.0.0.1:2")
UNTIMED: Final = {name: value for name, value in FORGED.items() if name != "x-envoy-upstream-rq-timeout-ms"}


@dataclasses.dataclass(frozen=True)
class Platform:
    """The joined Envoy in front of a fleet, and the Envoy of the team as it was before."""

    fleet: Fleet
    servers: Servers
    certificate: Certificate
    before: Config
    """Has the addresses of the Envoy as it was."""

    def client(self, host: str = LLM, config: Config | None = None, **headers: str) -> httpx.Client:
        return client_of(config or self.fleet.service.config, self.certificate, host, **headers)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    directory = tmp_path_factory.mktemp("platform")
    certificate = Certificate.make(directory)
    before = parse_config(yaml.safe_dump(write_config([{"models": ["*"], "workers": {"endpoints": ["http://x:1"]}}])))
    with ExitStack() as running:
        servers = running.enter_context(run_servers())

        def joined(config: Config) -> EnvoyProcess:
            bootstrap = read_bootstrap(config, servers, certificate)
            return EnvoyProcess(config, bootstrap=join(bootstrap, config, directory))

        running.enter_context(EnvoyProcess(before, bootstrap=read_bootstrap(before, servers, certificate)))
        fleet = running.enter_context(run_fleet(FAST, in_front=joined, **SETTINGS))
        client = client_of(fleet.service.config, certificate, LLM, authorization=token("team"))
        running.enter_context(client)
        yield Platform(dataclasses.replace(fleet, client=client), servers, certificate, before)


@pytest.fixture
def fleet(platform: Platform) -> Iterator[Fleet]:
    """Give the fleet without faults, and check that nothing stays reserved."""
    platform.fleet.recover()
    platform.fleet.forget()
    yield platform.fleet
    platform.fleet.recover()
    platform.fleet.settle()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_responses_are_complete(fleet: Fleet, path: str, stream: bool) -> None:
    """The filters of the platform, compression among them, leave responses whole."""
    outcome = ask(fleet.client, path, stream=stream)

    assert outcome.complete, outcome


def test_batch_has_a_room_for_each_prompt(fleet: Fleet) -> None:
    """Both legs of a batch have the same rooms."""
    answer = fleet.client.post(COMPLETIONS, json={"model": "any", "prompt": ["a", "bb", "ccc"], "max_tokens": 3})

    assert answer.status_code == 200
    prefill, decode = (json.loads(request["body"])["bootstrap_room"] for request in legs(fleet))
    assert prefill == decode
    assert len(set(prefill)) == 3


@pytest.mark.parametrize(
    ("role", "size"), [("prefill", 100), ("decode", 100), ("prefill", 2 << 20), ("decode", 32 << 20)]
)
def test_bodies_of_every_size_are_retried(fleet: Fleet, role: str, size: int) -> None:
    """The route has a buffer of its own, although the listener of the team has one of 32 KiB."""
    failing = (fleet.prefills if role == "prefill" else fleet.decodes)[0]
    failing.fault(inference="503")
    # Not in the prompt: an engine would rightly reject eight million tokens.
    body = b'{"model":"any","max_tokens":1,"prompt":"p","padding":"' + b"0123456789abcdef" * (size // 16) + b'"}'
    headers = {"content-type": "application/json"}
    statuses: list[int] = []
    while not failing.requests() and len(statuses) < 20:
        answer = fleet.client.post(COMPLETIONS, content=body, headers=headers)
        statuses.append(answer.status_code)
        assert not [name for name in answer.headers if name.startswith("x-dp-")]

    assert set(statuses) == {200}
    assert failing.requests()
    assert fleet.stat("cluster.dp_dispatch.retry_or_shadow_abandoned") == 0
    assert fleet.stat("cluster.dp_dispatch.upstream_rq_retry") > 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_killed_engine_costs_no_response(fleet: Fleet, role: str) -> None:
    """An engine that is killed before it has answered costs its clients a second attempt."""
    victim = (fleet.prefills if role == "prefill" else fleet.decodes)[0]
    victim.fault(inference="hang")
    asked: list[Future[Outcome]] = []

    def arrived() -> bool:
        return bool(victim.requests())

    def idle() -> bool:
        return arrived() or all(each.done() for each in asked)

    while not arrived():
        asked += [fleet.threads.submit(ask, fleet.client, CHAT, stream=bool(each % 2)) for each in range(4)]
        wait_for(idle)
    victim.stop(signal.SIGKILL)
    outcomes = [each.result() for each in asked]
    victim.start()
    victim.wait_until_listening()

    assert [str(each) for each in outcomes if not each.complete] == []


def test_abort_of_a_client_ends_both_legs(fleet: Fleet) -> None:
    """No engine goes on with the request of a client that has left."""
    with fleet.client.stream("POST", CHAT, json={**BODIES[CHAT], "max_tokens": 50_000, "stream": True}) as answer:
        next(answer.iter_bytes())
    fleet.settle()

    assert "aborted" in {request["outcome"] for engine in fleet.decodes for request in engine.requests()}


def test_long_pause_ends_no_stream(fleet: Fleet) -> None:
    """The route has no limits of time, although the connection manager allows pauses of 1 s and streams of 2 s."""
    for engine in fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 1, "seconds": 2.5})

    outcome = ask(fleet.client, CHAT, stream=True)

    assert outcome.complete, outcome


def test_client_controls_no_routing(platform: Platform, fleet: Fleet) -> None:
    """No header of a client reaches an engine, a decoy or Envoy's router."""
    decoy = Decoy()
    victims = [engine.url.removeprefix("http://") for engine in fleet.engines]
    headers = [forged_headers(victim, decoy.address) for victim in victims]
    answers = [fleet.client.post(CHAT, json=BODIES[CHAT], headers=each) for each in headers]
    decoy.close()

    assert {each.status_code for each in answers} == {200}
    assert decoy.visits == 0
    received = [request for engine in fleet.engines for request in engine.requests()]
    assert len(received) == 2 * len(answers)
    assert [name for each in received for name in each["headers"] if name.startswith(OURS)] == []


def test_filters_of_the_platform_act_before_the_block(platform: Platform, fleet: Fleet) -> None:
    """Authentication, authorization, CORS, compression and tracing work as on every other host."""
    origin = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}
    with platform.client() as anonymous, platform.client(authorization=token("suspended")) as suspended:
        assert anonymous.post(CHAT, json=BODIES[CHAT]).status_code == 401
        assert suspended.post(CHAT, json=BODIES[CHAT]).status_code == 403
        allowed = anonymous.options(CHAT, headers=origin)
    assert allowed.headers["access-control-allow-origin"] == origin["origin"]
    assert fleet.client.post(CHAT, json=BODIES[CHAT], headers={"x-tenant": "banned"}).status_code == 403
    assert fleet.running() == []
    compressed = fleet.client.post(CHAT, json={**BODIES[CHAT], "max_tokens": 50}, headers={"accept-encoding": "gzip"})
    streamed = fleet.client.post(CHAT, json={**BODIES[CHAT], "stream": True}, headers={"accept-encoding": "gzip"})
    assert compressed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in streamed.headers
    wait_for(lambda: platform.servers.spans)


@pytest.mark.parametrize(
    ("path", "headers", "size", "expected"),
    [
        pytest.param("echo", UNTIMED, 0, (200, 1), id="headers of ours"),
        pytest.param("flaky", {"x-envoy-retry-on": "5xx"}, 100, (200, 2), id="retries that the client asks for"),
        pytest.param("flaky", {"x-envoy-retry-on": "5xx"}, 100_000, (503, 1), id="a body above the listener's buffer"),
        pytest.param("slow", {}, 0, (504, 1), id="a response that takes too long"),
    ],
)
def test_neighbour_is_served_as_before(
    platform: Platform, path: str, headers: dict[str, str], size: int, expected: tuple[int, int]
) -> None:
    """Its backend gets the same requests, and its clients get the same responses.

    Clients of the platform are internal ones, so Envoy obeys their ``x-envoy-*`` headers on this host.
    """

    def ask_neighbour(config: Config) -> tuple[Any, ...]:
        where = f"/{path}/{uuid.uuid4()}"
        with platform.client(SHOP, config, **headers) as client:
            answer = client.post(where, content=b"x" * size)
        assert (answer.status_code, platform.servers.attempts[where]) == expected
        from_backend = "x-dp-retry" in answer.headers
        echoed = {name.lower(): value for name, value in answer.json().items()} if from_backend else answer.text
        if isinstance(echoed, dict):
            for changing in ("x-request-id", "traceparent", "host", "x-envoy-expected-rq-timeout-ms"):
                echoed.pop(changing, None)
        return {name for name in answer.headers if name != "date"}, echoed

    assert ask_neighbour(platform.fleet.service.config) == ask_neighbour(platform.before)


def test_configuration_of_the_neighbour_is_unchanged(platform: Platform) -> None:
    """Its virtual host and its cluster, the listener's limits and the order of its filters are those of the team."""

    def shown(config: Config) -> dict[str, Any]:
        dump = loopback.CLIENT.get(f"http://{config.envoy.admin}/config_dump").raise_for_status().json()["configs"]
        (listener,) = [
            each["listener"]
            for part in dump
            for each in part.get("static_listeners", ())
            if each["listener"]["name"] == "https"
        ]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        hosts = manager["route_config"]["virtual_hosts"]
        clusters = [each["cluster"] for part in dump for each in part.get("static_clusters", ())]
        manager["route_config"]["virtual_hosts"] = [each for each in hosts if each["name"] == "shop"]
        manager["http_filters"] = [each for each in manager["http_filters"] if not each.get("disabled")]
        del listener["address"]
        names = {"shop", "authz", "otel"}
        return {"listener": listener, "clusters": [each for each in clusters if each["name"] in names]}

    assert shown(platform.fleet.service.config) == shown(platform.before)


def legs(fleet: Fleet) -> list[dict[str, Any]]:
    """Wait for the legs of the one request, prefill first."""

    def finished() -> list[dict[str, Any]]:
        requests = [request for engine in fleet.engines for request in engine.requests()]
        return requests if len(requests) == 2 and {each["outcome"] for each in requests} == {"finished"} else []

    return wait_for(finished)
