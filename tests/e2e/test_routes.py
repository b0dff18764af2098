"""Every route of the engines does through Envoy what the table of routes says."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.request.routes import ROUTES, Cause, Route, Treatment
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST

STATUS = {Cause.CONTROL: 403, Cause.ONE_ENGINE: 404, Cause.STORED: 404, Cause.SOCKET: 404}
MODELS = ("pd", "sglang", "vllm")


@dataclass(frozen=True, slots=True)
class Fleet:
    """A disaggregated pool, and aggregated ones of both kinds, behind one Envoy."""

    prefill: HostedEngine
    pools: dict[str, HostedEngine]
    """The engine of each pool that may get a passed request."""
    client: httpx.Client

    def forget(self) -> None:
        for engine in (self.prefill, *self.pools.values()):
            engine.forget()

    def send(self, method: str, path: str, model: str = "") -> httpx.Response:
        body = {"model": model, "prompt": "abc", "tokens": [97], "messages": []}
        content = json.dumps(body) if method in {"POST", "PUT"} else None
        return self.client.request(method, path, content=content, headers={"content-type": "application/json"})

    def reached(self) -> list[str]:
        """The names of the pools whose engines got something, once for each request."""
        assert self.prefill.requests() == []
        return [name for name, engine in self.pools.items() for _ in engine.requests()]


@pytest.fixture(scope="module", params=["buffered", "full_duplex_streamed"])
def running(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = HostedEngines()
        prefill = engines.add("--role", "prefill", "--dp-size", "2", *FAST)
        pools = {
            "pd": engines.add("--role", "decode", "--dp-size", "2", *FAST),
            "sglang": engines.add("--dp-size", "2", *FAST),
            "vllm": engines.add("--kind", "vllm", *FAST),
        }
        running.enter_context(engines)
        config = [
            {"models": ["pd"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [pools["pd"].url]}},
            *({"models": [name], "workers": {"endpoints": [pools[name].url]}} for name in ("sglang", "vllm")),
        ]
        service = running.enter_context(ServiceProcess(write_config(config, envoy={"body_mode": request.param})))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(prefill, pools, client)
        service.wait_until_idle()


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.forget()
    return running


def path_of(route: Route) -> str:
    return f"{route.path}x" if len(route.path) > 1 and route.path.endswith("/") else route.path


def of(treatment: Treatment) -> list[tuple[str, Route]]:
    return [(method, route) for route in ROUTES if route.treatment is treatment for method in route.methods]


def test_refused_routes_reach_no_server(fleet: Fleet) -> None:
    """Neither an engine nor a client that waits for one is harmed."""
    for method, route in of(Treatment.REFUSED):
        assert route.cause is not None
        response = fleet.send(method, path_of(route), "sglang")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (STATUS[route.cause], "path_refused"), route
        assert route.cause.value in error["message"]

    assert fleet.reached() == []


def test_passed_routes_with_a_model_reach_a_server_of_its_pool(fleet: Fleet) -> None:
    """Of a disaggregated pool that is a decode engine. The body arrives as it was sent."""
    passed = [(method, route) for method, route in of(Treatment.PASSED) if route.by_model]
    for method, route in passed:
        for model in MODELS:
            fleet.forget()
            response = fleet.send(method, route.path, model)
            assert response.status_code in {200, 404}, route  # 404: not a path of this kind or release
            assert fleet.reached() == ([model] if response.status_code == 200 else []), route
            assert "x-dp-extproc-reason" not in response.headers


def test_passed_pages_are_those_of_a_server(fleet: Fleet) -> None:
    """A server answers, even if its answer is that it has no such page."""
    for method, route in of(Treatment.PASSED):
        if not route.by_model:
            assert "x-dp-extproc-reason" not in fleet.send(method, route.path).headers, route


def test_routes_without_a_room_reach_aggregated_pools_alone(fleet: Fleet) -> None:
    """In a disaggregated pool such a request could end an engine."""
    for method, route in of(Treatment.AGGREGATED):
        refused = fleet.send(method, route.path, "pd")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "path_cannot_carry_routing_fields")
        for model in ("sglang", "vllm"):
            fleet.forget()
            response = fleet.send(method, route.path, model)
            assert "x-dp-extproc-reason" not in response.headers, route
            assert fleet.reached() == ([model] if response.status_code not in {404, 405} else []), route


def test_head_is_answered_for_every_page(fleet: Fleet) -> None:
    """FastAPI has no HEAD; probes of load balancers use it."""
    pages = [route for route in ROUTES if route.treatment in {Treatment.PASSED, Treatment.ANSWERED}]
    statuses = {route.path: fleet.send("HEAD", route.path).status_code for route in pages if "GET" in route.methods}

    assert statuses.pop("/v1/models/") == 307
    assert set(statuses.values()) == {200}
    assert fleet.reached() == []


def test_slash_at_the_end_leads_to_the_path_without_it(fleet: Fleet) -> None:
    """Client libraries follow, with the method and the body."""
    response = fleet.client.post(
        "/v1/completions/", json={"model": "sglang", "prompt": "a", "max_tokens": 1}, follow_redirects=True
    )

    assert (response.status_code, [each.status_code for each in response.history]) == (200, [307])


def test_text_is_tokenized_by_a_decode_server(fleet: Fleet) -> None:
    """Both halves of a text's way to tokens and back."""
    tokens = fleet.client.post("/tokenize", json={"model": "pd", "prompt": "hi"}).json()
    text = fleet.client.post("/v1/detokenize", json={"model": "pd", "tokens": tokens["tokens"]}).json()

    assert tokens["count"] == 2
    assert text == {"text": "hi"}


def test_passed_request_is_repeated_on_another_engine() -> None:
    """The connection to one of two engines is refused, and no client notices."""
    hosted = HostedEngines()
    gone, left = hosted.add(*FAST), hosted.add(*FAST)
    pool = {"models": ["*"], "workers": {"endpoints": [gone.url, left.url]}}
    slow = {"interval": "300s", "stale_after": "600s"}  # the service does not notice by itself that an engine is gone
    with (
        hosted,
        ServiceProcess(write_config([pool], load=slow)) as service,
        EnvoyProcess(service.config) as envoy,
        loopback.client(envoy.url) as client,
    ):
        service.wait_until_fresh()
        hosted.close(gone)
        bodies = ({"prompt": "abc", "model": "m"} for _ in range(12))
        statuses = [client.post("/tokenize", json=body).status_code for body in bodies]

    assert statuses == [200] * 12
    assert len(left.requests()) == 12
