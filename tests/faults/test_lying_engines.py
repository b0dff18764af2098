"""Engines that try to steer the router by headers of their answers, in every form of the printed configuration."""

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
from faults.lying_engine import LyingServer
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
Lies = Callable[[HostedEngine], dict[str, str]]


def ours(other: HostedEngine) -> dict[str, str]:
    """Give what an engine might say in our name, with an address where one might be believed."""
    address = other.url.removeprefix("http://")
    lies: dict[str, str] = dict.fromkeys(OURS, address)
    return lies | {contract.RETRY: "1", contract.FAILED: f"-,{address},cut", contract.AVOID: f"-,{address},cut"}


def envoys(_other: HostedEngine) -> dict[str, str]:
    """Give what it might say in Envoy's; apart from ours, as some of these headers forbid what others ask for."""
    return ENVOYS


@dataclass(frozen=True)
class Engines:
    """Two of each kind, of which each accuses the other."""

    prefills: Sequence[HostedEngine]
    decodes: Sequence[HostedEngine]
    workers: Sequence[HostedEngine]

    @property
    def all(self) -> Sequence[HostedEngine]:
        return (*self.prefills, *self.decodes, *self.workers)

    def visits(self, engines: Sequence[HostedEngine], request_id: str) -> int:
        """Count how often a request has come to any of these."""
        return sum(server_of(engine).visits[request_id] for engine in engines)

    def lie(self, lies: Lies) -> None:
        """Have each say something of the other."""
        for first, second in (self.prefills, self.decodes, self.workers):
            server_of(first).lies, server_of(second).lies = lies(second), lies(first)


@dataclass(frozen=True)
class Fleet:
    """Everything that runs."""

    engines: Engines
    service: ServiceProcess
    client: httpx.Client
    told: set[str] = field(default_factory=set)
    """What engines have told clients that is none of their business."""

    def ask(self, method: str, path: str, **more: Any) -> tuple[str, httpx.Response]:
        """Send a request under an id of its own, and remember which steering headers came with its answer."""
        request_id = f"request-{next(_NUMBERS)}"
        answer = self.client.request(method, path, headers={"x-request-id": request_id}, **more)
        self.told.update(name for name in answer.headers if name.startswith(("x-dp-", "x-envoy-")))
        return request_id, answer

    def counted(self, metric: str) -> dict[str, float]:
        """Give what a metric counts, by its labels."""
        page = self.service.metrics()
        assert f"# TYPE {metric.removesuffix('_total')}" in page
        lines = [line for line in page.splitlines() if line.startswith(metric + "{")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.endswith(" 0.0")}


def server_of(engine: HostedEngine) -> LyingServer:
    assert isinstance(engine.server, LyingServer)
    return engine.server


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    hosted = HostedEngines()
    options = ("--header-overrides", "--dp-attention", "--dp-size", "2", *FAST)
    pairs = {
        role: [hosted.add("--role", role, *options, build=LyingServer) for _ in range(2)]
        for role in ("prefill", "decode", "unified")
    }
    with hosted:
        yield Engines(pairs["prefill"], pairs["decode"], pairs["unified"])


@contextmanager
def run_fleet(
    engines: Engines, body_mode: BodyMode, truncated_streams: TruncatedStreams, supervise: Supervise, *pools: str
) -> Iterator[Fleet]:
    """Run a service for these pools, where a single failure is enough to eject a server."""
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


def ask_everything(fleet: Fleet, pool: str, paths: Sequence[str]) -> None:
    """Send a request of each kind, and see that each leg has come to an engine once."""
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
def test_no_header_of_an_engine_steers_the_router(
    engines: Engines, body_mode: BodyMode, truncated_streams: TruncatedStreams, supervise: Supervise
) -> None:
    """Each request is sent once, nobody is blamed for anything, and clients are told nothing of it."""
    pools = ("pairs",) if body_mode is BodyMode.NONE else ("pairs", "workers")
    with run_fleet(engines, body_mode, truncated_streams, supervise, *pools) as fleet:
        engines.lie(ours)
        for pool in pools:
            ask_everything(fleet, pool, PATHS)
        engines.lie(envoys)
        ask_everything(fleet, pools[-1], PATHS[:1])

        assert fleet.counted("dp_extproc_leg_failures_total") == {}
        assert fleet.counted("dp_extproc_endpoint_ejected") == {}
        assert fleet.told == set()


@pytest.fixture(params=[ours, envoys])
def usual(engines: Engines, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The default form."""
    engines.lie(request.param)
    with run_fleet(engines, BodyMode.BUFFERED, TruncatedStreams.ERROR_EVENT, Supervise.FIRST_EVENT, "pairs") as fleet:
        yield fleet


def switch(engines: Sequence[HostedEngine], kind: Kind) -> None:
    for engine in engines:
        engine.fault(inference=Fault(kind))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("role", ["prefills", "decodes"])
def test_an_error_of_the_client_is_told_once(usual: Fleet, role: str, stream: bool) -> None:
    """What an engine refuses is not sent to others, whatever its headers say."""
    sick: Sequence[HostedEngine] = getattr(usual.engines, role)
    switch(sick, Kind.BAD_REQUEST)
    try:
        request_id, answer = usual.ask("POST", PATHS[0], json=body_of(PATHS[0], "pairs", stream=stream))
    finally:
        switch(sick, Kind.OK)

    assert answer.status_code == 400
    assert usual.engines.visits(sick, request_id) == 1
    assert usual.counted("dp_extproc_endpoint_ejected") == {}
    assert usual.told == set()


def test_a_server_that_fails_is_blamed_and_not_the_one_that_it_names(usual: Fleet) -> None:
    """Its request is placed anew, once, as the service says; where it has failed is the service's word, too."""
    sick, well = usual.engines.decodes
    switch([sick], Kind.INTERNAL)
    try:
        while True:  # ties are broken at random
            request_id, answer = usual.ask("POST", PATHS[0], json=body_of(PATHS[0], "pairs", stream=False))
            assert answer.status_code == 200
            if usual.engines.visits([sick], request_id):
                break
    finally:
        switch([sick], Kind.OK)

    assert usual.engines.visits([well], request_id) == 1
    assert list(usual.counted("dp_extproc_leg_failures_total").values()) == [1.0]
    ejected = usual.counted("dp_extproc_endpoint_ejected")
    assert not any(well.url in labels for labels in ejected)
    assert usual.told == set()
