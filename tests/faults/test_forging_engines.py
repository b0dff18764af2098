"""Engines cannot control the router by headers of their responses, in every form of the printed configuration."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any, Final

import httpx
import pytest

from dp_extproc import contract
from dp_extproc.config import BodyMode, Supervise, TruncatedStreams
from dp_extproc.lab.engine.api.faults import Fault, Kind
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from faults.forging_engine import ForgingEngine
from patience import wait_for

FORMS: Final = list(product(BodyMode, TruncatedStreams, Supervise))
OURS: Final[tuple[str, ...]] = (*contract.SET_INSIDE, contract.SESSION, "x-dp-extproc-reason", "x-dp-anything")
ENVOYS: Final = {
    "x-envoy-ratelimited": "true",
    "x-envoy-overloaded": "true",
    "x-envoy-immediate-health-check-fail": "true",
    "x-envoy-degraded": "true",
    "x-envoy-retry-on": "5xx,retriable-headers",
    "x-envoy-retriable-header-names": "content-type",
    "x-envoy-retriable-status-codes": "200",
    "x-envoy-max-retries": "9",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-upstream-healthchecked-cluster": "other",
    "x-envoy-upstream-service-time": "1",
    "x-envoy-decorator-operation": "other",
}
PATHS: Final = ("/v1/chat/completions", "/generate")
LOOKUPS: Final = ("/health", "/server_info")
_NUMBERS: Final = count()
ForgedHeaders = Callable[[HostedEngine], dict[str, str]]


def ours(other: HostedEngine) -> dict[str, str]:
    """List headers in the name of the service, with an address wherever the router could accept one."""
    address = other.url.removeprefix("http://")
    forged_headers: dict[str, str] = dict.fromkeys(OURS, address)
    return forged_headers | {
        contract.RETRY: "1",
        contract.FAILED: f"-,{address},cut",
        contract.AVOID: f"-,{address},cut",
    }


def envoys(_other: HostedEngine) -> dict[str, str]:
    """List headers in Envoy's name; they are separate, because some of them forbid what the others cause."""
    return ENVOYS


@dataclass(frozen=True)
class Engines:
    """Two engines of each kind, each of which blames the other."""

    prefills: Sequence[HostedEngine]
    decodes: Sequence[HostedEngine]
    workers: Sequence[HostedEngine]

    @property
    def all(self) -> Sequence[HostedEngine]:
        return (*self.prefills, *self.decodes, *self.workers)

    def visits(self, engines: Sequence[HostedEngine], request_id: str) -> int:
        """Count how often a request has come to any of these engines."""
        return sum(server_of(engine).visits[request_id] for engine in engines)

    def forge(self, forged_headers: ForgedHeaders) -> None:
        """Let each engine blame the other."""
        for first, second in (self.prefills, self.decodes, self.workers):
            server_of(first).forged_headers, server_of(second).forged_headers = (
                forged_headers(second),
                forged_headers(first),
            )


@dataclass(frozen=True)
class Fleet:
    """The engines, the service, and a client."""

    engines: Engines
    service: ServiceProcess
    client: httpx.Client
    leaked: set[str] = field(default_factory=set)
    """Internal headers of engines that reached clients."""

    def ask(self, method: str, path: str, **more: Any) -> tuple[str, httpx.Response]:
        """Send a request under its own id, and collect the internal headers of its response."""
        request_id = f"request-{next(_NUMBERS)}"
        answer = self.client.request(method, path, headers={"x-request-id": request_id}, **more)
        self.leaked.update(name for name in answer.headers if name.startswith(("x-dp-", "x-envoy-")))
        return request_id, answer

    def counted(self, metric: str) -> dict[str, float]:
        """Return a metric's values, by its labels."""
        page = self.service.metrics()
        assert f"# TYPE {metric.removesuffix('_total')}" in page
        lines = [line for line in page.splitlines() if line.startswith(metric + "{")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.endswith(" 0.0")}


def server_of(engine: HostedEngine) -> ForgingEngine:
    assert isinstance(engine.server, ForgingEngine)
    return engine.server


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    hosted = HostedEngines()
    options = ("--header-overrides", "--dp-attention", "--dp-size", "2", *FAST)
    pairs = {
        role: [hosted.add("--role", role, *options, build=ForgingEngine) for _ in range(2)]
        for role in ("prefill", "decode", "unified")
    }
    with hosted:
        yield Engines(pairs["prefill"], pairs["decode"], pairs["unified"])


@contextmanager
def run_fleet(
    engines: Engines, body_mode: BodyMode, truncated_streams: TruncatedStreams, supervise: Supervise, *pools: str
) -> Iterator[Fleet]:
    """Run a service for these pools, where a single failure ejects an endpoint."""
    unseen: dict[str, Any] = (
        {"routing_fields": "headers", "policy": {"affinity": {"prefixes": False}}} if body_mode is BodyMode.NONE else {}
    )
    known: dict[str, dict[str, Any]] = {
        "pairs": {"prefill": _urls(engines.prefills), "decode": _urls(engines.decodes), **unseen},
        "workers": {"workers": _urls(engines.workers)},
    }
    content = write_config(
        [{"models": [name if len(pools) > 1 else "*"], **known[name]} for name in pools],
        envoy={"body_mode": body_mode.value, "truncated_streams": truncated_streams.value},
        supervision={"mode": supervise.value},
        outlier_detection={"consecutive_failures": 1},
    )
    with ExitStack() as running:
        service = running.enter_context(ServiceProcess(content))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        yield Fleet(engines, service, running.enter_context(loopback.client(envoy.url)))
        service.wait_until_idle()


def _urls(engines: Sequence[HostedEngine]) -> dict[str, list[str]]:
    return {"endpoints": [each.url for each in engines]}


def body_of(path: str, model: str, *, stream: bool) -> dict[str, Any]:
    if path == "/generate":
        return {"model": model, "text": "hi", "sampling_params": {"max_new_tokens": 2}, "stream": stream}
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": stream}


def send_all_kinds(fleet: Fleet, pool: str, paths: Sequence[str]) -> None:
    """Send a request of each kind, and check that each leg has come to an engine once."""
    engines = fleet.engines
    legs = [engines.prefills, engines.decodes] if pool == "pairs" else [engines.workers]
    asked, looked_up = [], []
    for path, stream in product(paths, (False, True)):
        request_id, answer = fleet.ask("POST", path, json=body_of(path, pool, stream=stream))
        assert answer.status_code == 200, answer.text
        asked.append(request_id)
    for path in LOOKUPS:
        request_id, answer = fleet.ask("GET", path)
        assert answer.status_code == 200
        looked_up.append(request_id)
    wait_for(lambda: all(engines.visits(leg, each) for each in asked for leg in legs))
    fleet.service.wait_until_idle()
    assert [engines.visits(leg, each) for each in asked for leg in legs] == [1] * len(legs) * len(asked)
    assert [engines.visits(engines.all, each) for each in looked_up] == [1] * len(looked_up)


@pytest.mark.parametrize(("body_mode", "truncated_streams", "supervise"), FORMS)
def test_an_engine_header_controls_no_routing(
    engines: Engines, body_mode: BodyMode, truncated_streams: TruncatedStreams, supervise: Supervise
) -> None:
    """Each request is sent once, no endpoint is blamed, and no internal header reaches a client."""
    pools = ("pairs",) if body_mode is BodyMode.NONE else ("pairs", "workers")
    with run_fleet(engines, body_mode, truncated_streams, supervise, *pools) as fleet:
        engines.forge(ours)
        for pool in pools:
            send_all_kinds(fleet, pool, PATHS)
        engines.forge(envoys)
        send_all_kinds(fleet, pools[-1], PATHS[:1])

        assert fleet.counted("dp_extproc_leg_failures_total") == {}
        assert fleet.counted("dp_extproc_endpoint_ejected") == {}
        assert fleet.leaked == set()


@pytest.fixture(params=[ours, envoys])
def usual(engines: Engines, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Give the default form."""
    engines.forge(request.param)
    with run_fleet(engines, BodyMode.BUFFERED, TruncatedStreams.ERROR_EVENT, Supervise.FIRST_EVENT, "pairs") as fleet:
        yield fleet


def switch(engines: Sequence[HostedEngine], kind: Kind) -> None:
    for engine in engines:
        engine.fault(inference=Fault(kind))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("role", ["prefills", "decodes"])
def test_an_error_of_the_client_is_returned_without_a_retry(usual: Fleet, role: str, stream: bool) -> None:
    """A rejection by an engine is not retried on others, whatever its headers contain."""
    failing: Sequence[HostedEngine] = getattr(usual.engines, role)
    switch(failing, Kind.BAD_REQUEST)
    try:
        request_id, answer = usual.ask("POST", PATHS[0], json=body_of(PATHS[0], "pairs", stream=stream))
    finally:
        switch(failing, Kind.OK)

    assert answer.status_code == 400
    assert usual.engines.visits(failing, request_id) == 1
    assert usual.counted("dp_extproc_endpoint_ejected") == {}
    assert usual.leaked == set()


def test_a_failing_engine_is_blamed_instead_of_the_one_it_names(usual: Fleet) -> None:
    """The service decides that its request is retried, once, and which endpoint gets the blame."""
    failing, well = usual.engines.decodes
    switch([failing], Kind.INTERNAL)
    try:
        while True:  # ties are broken at random
            request_id, answer = usual.ask("POST", PATHS[0], json=body_of(PATHS[0], "pairs", stream=False))
            assert answer.status_code == 200
            if usual.engines.visits([failing], request_id):
                break
    finally:
        switch([failing], Kind.OK)

    assert usual.engines.visits([well], request_id) == 1
    assert list(usual.counted("dp_extproc_leg_failures_total").values()) == [1.0]
    ejected = usual.counted("dp_extproc_endpoint_ejected")
    assert not any(well.url in labels for labels in ejected)
    assert usual.leaked == set()
