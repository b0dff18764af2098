"""The monitor against HTTP servers on real sockets, well-behaved and not."""

import asyncio
import itertools
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from dp_extproc.background import Guard
from dp_extproc.config import LoadSettings, LoadSource
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.fleet.monitor import FleetMonitor
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.observability.log import EngineLog
from fleet.scripted_engine import Answer, ScriptedEngine, cut_off, drip, flood, hang, not_http, reset

DEADLINE = 20.0


def run(story: Coroutine[Any, Any, None]) -> None:
    """Run a test's story in a loop of its own."""
    asyncio.run(story)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in code that sets no event
            await asyncio.sleep(0.005)


def info(ranks: int = 2, **more: object) -> bytes:
    return json.dumps({"version": "0.5.23", "dp_size": ranks, "disaggregation_mode": "null"} | more).encode()


def loads(*used: int) -> bytes:
    return json.dumps({"loads": [{"dp_rank": i, "num_used_tokens": tokens} for i, tokens in enumerate(used)]}).encode()


def metrics(*used: int) -> bytes:
    lines = [f'sglang:num_used_tokens{{dp_rank="{i}"}} {tokens}\n' for i, tokens in enumerate(used)]
    return "".join([*lines, "sglang:prompt_tokens_total 77\n"]).encode()


def healthy() -> dict[str, Answer]:
    return {"/server_info": info(), "/v1/loads": loads(10, 20)}


def settings(**more: object) -> LoadSettings:
    values: dict[str, object] = {"interval": "20ms", "stale_after": "5s", "timeout": "5s"}
    return LoadSettings.model_validate(values | more)


def endpoint(url: str, role: Role = Role.WORKER, **more: Any) -> Endpoint:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return Endpoint(url, host.strip("[]"), int(port), "pool", role, **more)


@dataclass
class Recorder:
    """A listener that keeps all events."""

    discoveries: list[tuple[str, str, EngineFacts]] = field(default_factory=list)
    samples: list[tuple[str, LoadPage]] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    failures: list[tuple[str, EngineFailure]] = field(default_factory=list)

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        self.discoveries.append((endpoint.url, address, facts))

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        self.samples.append((endpoint.url, page))
        self.times.append((started, now))

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        self.failures.append((endpoint.url, failure))

    def kinds(self) -> set[FailureKind]:
        return {failure.kind for _, failure in self.failures}

    def failures_of(self, url: str) -> list[EngineFailure]:
        return [failure for each, failure in self.failures if each == url]

    def used(self) -> list[list[int]]:
        return [[sample.used_tokens for sample in page.ranks] for _, page in self.samples]


class Clock:
    """Monotonic time that can be advanced."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@asynccontextmanager
async def scraping(
    *endpoints: Endpoint,
    load: LoadSettings | None = None,
    clock: Callable[[], float] = time.monotonic,
    guard: Guard | None = None,
    events: Recorder | None = None,
) -> AsyncIterator[tuple[FleetMonitor, Recorder]]:
    """Run a monitor for as long as the block lasts."""
    events = events or Recorder()
    monitor = FleetMonitor(
        endpoints,
        load or settings(),
        (events, EngineLog(logging.getLogger("dp_extproc.fleet"))),
        clock=clock,
        rng=random.Random(1),
        guard=guard or Guard(),
    )
    task = asyncio.create_task(monitor.run())
    try:
        yield monitor, events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled(), task.exception()


def test_engine_is_discovered_once_and_sampled_in_every_round() -> None:
    """All rounds use one connection."""

    async def story() -> None:
        pages = healthy() | {"/server_info": info(enable_metrics=False), "/ready": b"", "/v1/models": b"{}"}
        async with ScriptedEngine(pages) as engine, scraping(endpoint(engine.url)) as (monitor, events):
            await until(lambda: len(events.samples) >= 5)

            assert monitor.first_round.is_set()
            assert [(url, address, facts.dp_ranks) for url, address, facts in events.discoveries] == [
                (engine.url, f"127.0.0.1:{engine.port}", 2)
            ]
            assert set(map(tuple, events.used())) == {(10, 20)}
            assert all(started <= now for started, now in events.times)
            assert not events.failures
            assert engine.connections == 1

    run(story())


@pytest.mark.parametrize(
    ("answer", "load", "kind"),
    [
        # A second: of the pages that do come none may take longer, on however slow a machine.
        pytest.param(hang, {"timeout": "1s"}, FailureKind.TIMEOUT, id="hangs"),
        pytest.param(drip, {"timeout": "1s"}, FailureKind.TIMEOUT, id="drips"),
        pytest.param(flood, {"max_page_bytes": 200_000}, FailureKind.TOO_LARGE, id="floods"),
        pytest.param(b" " * 5000, {"max_page_bytes": 4096}, FailureKind.TOO_LARGE, id="large"),
        pytest.param(reset, {}, FailureKind.UNREADABLE, id="resets"),
        pytest.param(not_http, {}, FailureKind.UNREADABLE, id="not-http"),
        pytest.param(cut_off, {}, FailureKind.UNREADABLE, id="cut-off"),
        pytest.param(b"<html>", {}, FailureKind.UNREADABLE, id="html"),
        pytest.param(b"{}", {}, FailureKind.WRONG_SHAPE, id="foreign-json"),
        pytest.param(500, {}, FailureKind.HTTP_STATUS, id="500"),
        pytest.param(301, {}, FailureKind.HTTP_STATUS, id="redirect"),
        pytest.param(401, {}, FailureKind.HTTP_STATUS, id="401"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/loads", "/server_info"])
def test_failure_of_one_engine_leaves_the_others_alone(
    path: str, answer: Answer, load: dict[str, object], kind: FailureKind
) -> None:
    """Its kind is reported, whatever the engine does on a page."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as good,
            ScriptedEngine(healthy() | {path: answer}) as bad,
            scraping(endpoint(good.url), endpoint(bad.url), load=settings(**load)) as (monitor, events),
        ):
            await until(lambda: len(events.failures_of(bad.url)) >= 2)
            await monitor.first_round.wait()
            seen = len(events.samples)
            await until(lambda: len(events.samples) >= seen + 3)

            assert {failure.kind for failure in events.failures_of(bad.url)} == {kind}
            assert all(path in failure.message for failure in events.failures_of(bad.url))
            assert {url for url, _ in events.samples} == {good.url}

    run(story())


def test_refused_connection_is_a_failure() -> None:
    """The first round is over nevertheless."""

    async def story() -> None:
        async with scraping(endpoint(f"http://127.0.0.1:{free_port()}")) as (monitor, events):
            await monitor.first_round.wait()

            assert events.kinds() == {FailureKind.REFUSED}
            assert not events.discoveries

    run(story())


def test_name_without_address_is_a_failure() -> None:
    """Its kind is distinct from a refused connection."""

    async def story() -> None:
        async with scraping(endpoint("http://no-such-engine.invalid:30000")) as (monitor, events):
            await monitor.first_round.wait()

            assert events.kinds() == {FailureKind.UNRESOLVABLE}

    run(story())


def test_name_is_resolved_and_sent_as_host_header() -> None:
    """Envoy gets the IPv4 address at which the engine is read."""

    async def story() -> None:
        async with ScriptedEngine(healthy()) as engine:
            named = endpoint(f"http://localhost:{engine.port}")
            async with scraping(named) as (_, events):
                await until(lambda: events.samples)

                assert events.discoveries[0][1] == f"127.0.0.1:{engine.port}"
                assert engine.host_headers == {f"localhost:{engine.port}"}

    run(story())


def test_address_is_kept_while_it_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several addresses, in any order, an IPv4 address is preferred."""

    async def story() -> None:
        answers: list[str] = []

        def look_up(host: str, port: int, **more: object) -> list[Any]:
            families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in answers]
            return [(family, 1, 6, "", (each, port)) for family, each in zip(families, answers, strict=True)]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        async with make_client() as client:
            engine = EngineClient(endpoint("http://engine.test:30000"), settings(), client)
            answers[:] = ["fd00::1", "10.0.0.1", "10.0.0.2"]
            assert await engine.resolve() == "10.0.0.1:30000"
            answers[:] = ["10.0.0.2", "10.0.0.1"]
            assert await engine.resolve() == "10.0.0.1:30000"
            answers[:] = ["10.0.0.2"]
            assert await engine.resolve() == "10.0.0.2:30000"
            answers[:] = ["fd00::1"]
            assert await engine.resolve() == "[fd00::1]:30000"

    run(story())


def test_ipv6_address_is_kept_in_brackets() -> None:
    """It needs no look-up."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback on this machine")

    async def story() -> None:
        async with (
            ScriptedEngine(healthy(), host="::1") as engine,
            scraping(endpoint(f"http://[::1]:{engine.port}")) as (_, events),
        ):
            await until(lambda: events.samples)

            assert events.discoveries[0][1] == f"[::1]:{engine.port}"
            assert engine.host_headers == {f"[::1]:{engine.port}"}

    run(story())


def test_auto_source_falls_back_to_metrics() -> None:
    """An engine without /v1/loads is asked for that page once, not in every round."""

    async def story() -> None:
        pages: dict[str, Answer] = {"/server_info": info(), "/metrics": metrics(1, 2)}
        async with ScriptedEngine(pages) as engine, scraping(endpoint(engine.url)) as (_, events):
            await until(lambda: len(events.samples) >= 4)

            assert events.used()[0] == [1, 2]
            assert events.samples[0][1].prompt_tokens == 77
            assert engine.requests.count("/v1/loads") == 1
            assert not events.failures

    run(story())


def test_engine_that_was_away_is_discovered_again() -> None:
    """It may have been upgraded, and have the better page of load."""

    async def story() -> None:
        old: dict[str, Answer] = {"/get_server_info": info(version="0.5.5"), "/metrics": metrics(1, 2)}
        engine = ScriptedEngine(old)
        async with engine, scraping(endpoint(engine.url)) as (_, events):
            await until(lambda: events.samples)
            await engine.stop()
            await until(lambda: FailureKind.REFUSED in events.kinds())
            engine.pages = {"/server_info": info(4), "/v1/loads": loads(5, 6, 7, 8)}
            await engine.start()
            await until(lambda: [5, 6, 7, 8] in events.used())

            assert [str(facts.version) for _, _, facts in events.discoveries] == ["0.5.5", "0.5.23"]

    run(story())


@pytest.mark.parametrize(
    ("source", "pages", "part"),
    [
        pytest.param(LoadSource.LOADS, {"/metrics": metrics(1, 2)}, "load.source", id="loads"),
        pytest.param(LoadSource.METRICS, {"/v1/loads": loads(1, 2)}, "--enable-metrics", id="metrics"),
        pytest.param(LoadSource.AUTO, {}, "--enable-metrics", id="neither"),
    ],
)
def test_absent_source_is_a_failure_with_its_remedy(source: LoadSource, pages: dict[str, Answer], part: str) -> None:
    """No other source is used instead."""

    async def story() -> None:
        async with (
            ScriptedEngine({"/server_info": info()} | pages) as engine,
            scraping(endpoint(engine.url), load=settings(source=source.value)) as (_, events),
        ):
            await until(lambda: len(events.failures) >= 3)

            assert events.kinds() == {FailureKind.HTTP_STATUS}
            assert part in events.failures[0][1].message
            assert not events.samples
            assert len(events.discoveries) == 1

    run(story())


def test_engine_joins_when_it_is_ready() -> None:
    """Until then it is neither discovered nor sampled, and its failure is one of its own kind."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/ready": 503}) as engine,
            scraping(endpoint(engine.url)) as (monitor, events),
        ):
            await monitor.first_round.wait()
            await until(lambda: len(events.failures) >= 3)
            assert events.kinds() == {FailureKind.NOT_READY}
            assert "/ready answered 503" in events.failures[0][1].message
            assert (events.discoveries, events.samples) == ([], [])

            engine.pages = healthy() | {"/ready": b""}
            await until(lambda: events.samples)
            assert len(events.discoveries) == 1
            assert engine.requests.count("/server_info") == 1

    run(story())


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_engine_without_a_readiness_page_joins(status: int) -> None:
    """Releases before 0.5.20 with an API key, and proxies, may refuse an absent page with other codes than 404."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/ready": status}) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 3)

            assert events.failures == []
            assert engine.requests.count("/ready") == 1

    run(story())


def test_readiness_of_an_engine_is_read_every_two_seconds() -> None:
    """One that is not ready any more is sampled on, and is discovered again when it is ready."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy() | {"/ready": b""}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 3)
            assert engine.requests.count("/ready") == 1
            engine.pages = healthy() | {"/ready": 503}
            clock.ahead += 3
            await until(lambda: events.failures)
            seen = len(events.samples)
            await until(lambda: len(events.samples) >= seen + 3)
            assert events.kinds() == {FailureKind.NOT_READY}
            assert all(failure.page_was_read for _, failure in events.failures)

            engine.pages = healthy() | {"/ready": b""}
            await until(lambda: len(events.discoveries) == 2)
            assert engine.requests.count("/server_info") == 1

    run(story())


def test_prompt_tokens_are_read_from_metrics_once_in_many_rounds() -> None:
    """The load comes from /v1/loads."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/metrics": metrics(1, 2)}) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 4)

            assert [page.prompt_tokens for _, page in events.samples[:3]] == [77, None, None]
            assert engine.requests.count("/metrics") == 1

    run(story())


def test_prompt_tokens_are_read_again_after_ten_seconds() -> None:
    """The facts are not read again for that."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy() | {"/metrics": metrics(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 3)
            clock.ahead += 11
            await until(lambda: [page.prompt_tokens for _, page in events.samples].count(77) == 2)

            assert engine.requests.count("/server_info") == 1

    run(story())


def test_facts_are_read_again_after_a_minute() -> None:
    """An engine may be replaced between two rounds."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: events.samples)
            engine.pages = healthy() | {"/server_info": info(version="0.5.24")}
            clock.ahead += 61
            await until(lambda: len(events.discoveries) == 2)

            assert str(events.discoveries[1][2].version) == "0.5.24"
            assert not events.failures

    run(story())


def test_load_is_read_on_while_facts_cannot_be_read() -> None:
    """The failure is reported, and the facts are read again a minute later."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: events.samples)
            engine.pages = healthy() | {"/server_info": 503}
            clock.ahead += 61
            await until(lambda: events.failures)
            seen = len(events.samples)
            await until(lambda: len(events.samples) >= seen + 3)

            assert events.kinds() == {FailureKind.HTTP_STATUS}
            assert engine.requests.count("/server_info") == 2

            engine.pages = healthy()
            clock.ahead += 61
            await until(lambda: len(events.discoveries) == 2)

    run(story())


def test_sample_counts_without_prompt_tokens() -> None:
    """A /metrics page that cannot be read is no failure here."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/metrics": b"\xff"}) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)

            assert not events.failures

    run(story())


@pytest.mark.parametrize(
    ("page", "kept"),
    [
        pytest.param(loads(1, 2, 3), [1, 2], id="too-many"),
        pytest.param(loads(1), [1], id="too-few"),
    ],
)
def test_samples_of_unknown_ranks_are_left_out(page: bytes, kept: list[int]) -> None:
    """The difference to /server_info is reported."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/v1/loads": page}) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: events.failures and len(events.samples) >= 2)

            assert events.kinds() == {FailureKind.DISAGREEMENT}
            assert set(map(tuple, events.used())) == {tuple(kept)}

    run(story())


def test_reported_ranks_count_more_than_configured_ones() -> None:
    """The difference is reported."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url, dp_size=8)) as (_, events),
        ):
            await until(lambda: events.failures)

            assert events.discoveries[0][2].dp_ranks == 2
            assert events.kinds() == {FailureKind.DISAGREEMENT}
            assert "dp_size is 8" in events.failures[0][1].message

    run(story())


def test_configured_ranks_replace_hidden_facts() -> None:
    """The failure of /server_info is reported nevertheless."""

    async def story() -> None:
        async with (
            ScriptedEngine({"/v1/loads": loads(1, 2)}) as engine,
            scraping(endpoint(engine.url, Role.PREFILL, dp_size=2)) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)

            (_, _, facts), *others = events.discoveries
            assert (facts.version, facts.dp_ranks, facts.follows_rooms) == (None, 2, True)
            assert not others
            assert events.kinds() == {FailureKind.HTTP_STATUS}

    run(story())


def test_wrong_role_is_a_disagreement() -> None:
    """The message has the remedy."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url, Role.DECODE)) as (_, events),
        ):
            await until(lambda: events.failures)

            assert events.kinds() == {FailureKind.DISAGREEMENT}
            assert "--disaggregation-mode decode" in events.failures[0][1].message

    run(story())


class RaisingRecorder(Recorder):
    """A listener that raises over one engine until it is repaired."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.fails_over = url

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        if endpoint.url == self.fails_over:
            raise ZeroDivisionError("float division by zero")
        super().sampled(endpoint, page, started, now)


def test_exception_of_a_listener_concerns_one_engine(caplog: pytest.LogCaptureFixture) -> None:
    """It is a failure of that engine, logged once and counted; the others are read on."""

    async def story() -> None:
        async with ScriptedEngine(healthy()) as odd, ScriptedEngine(healthy()) as even:
            guard, events = Guard(), RaisingRecorder(odd.url)
            async with scraping(endpoint(odd.url), endpoint(even.url), guard=guard, events=events) as (monitor, _):
                await monitor.first_round.wait()
                await until(lambda: guard.failures["scrape"] >= 2)
                seen = len(events.samples)
                await until(lambda: len(events.samples) >= seen + 5)
                assert events.kinds() == {FailureKind.INTERNAL}
                assert events.failures_of(even.url) == []
                events.fails_over = ""
                await until(lambda: odd.url in {url for url, _ in events.samples})

    run(story())
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert next(each.getMessage() for each in caplog.records if "internal" in each.getMessage()).endswith("see the log")


def page_of(*used: int, mode: str = "null", **more: object) -> bytes:
    """Make a page of /v1/loads with what recent releases report beside the load."""
    ranks = [
        {"dp_rank": rank, "num_used_tokens": tokens, "disaggregation": {"mode": mode}}
        for rank, tokens in enumerate(used)
    ]
    ranks[0] |= {"total_prefill_uncached_tokens": more.pop("computed", 10)}
    ranks[1:] = [each | {"total_prefill_uncached_tokens": 0} for each in ranks[1:]]
    return json.dumps({"version": "0.5.23", "loads": ranks, **more}).encode()


@pytest.mark.parametrize(
    ("page", "facts"),
    [
        pytest.param(page_of(1, 2, 3, 4), info(4), id="more ranks"),
        pytest.param(page_of(1), info(1), id="fewer ranks"),
        pytest.param(page_of(1, 2, version="0.5.22"), info(version="0.5.22"), id="another release"),
        pytest.param(
            page_of(1, 2, mode="decode"),
            info(enable_pd_role_switch=True, internal_states=[{"disaggregation_mode": "decode"}]),
            id="another role",
        ),
        pytest.param(page_of(1, 2, computed=3), info(disaggregation_bootstrap_port=9999), id="counts that fell"),
    ],
)
def test_contradiction_puts_an_engine_in_doubt_until_its_facts_were_read(page: bytes, facts: bytes) -> None:
    """They are read in the same round, before a sample of the other engine counts."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine({"/server_info": info(), "/v1/loads": page_of(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            clock.ahead += 1.0
            engine.pages = {"/server_info": facts, "/v1/loads": page}
            await until(lambda: len(events.discoveries) == 2)
            seen = len(events.samples)
            await until(lambda: len(events.samples) >= seen + 3)

            doubts = [failure.kind for _, failure in events.failures if failure.is_doubt]
            assert doubts == [FailureKind.CHANGED]
            assert engine.requests.count("/server_info") == 2

    run(story())


def test_page_that_always_contradicts_the_facts_is_read_on() -> None:
    """An engine is asked once, and stays in use with the ranks that it has."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine({"/server_info": info(), "/v1/loads": page_of(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            clock.ahead += 1.0
            engine.pages["/v1/loads"] = page_of(1)
            await until(lambda: len(events.samples) >= 8)

            assert engine.requests.count("/server_info") == 2
            assert len(events.discoveries) == 2, "it takes requests again"

    run(story())


def test_answer_in_place_of_the_page_puts_an_engine_in_doubt_once() -> None:
    """A proxy without an engine behind it answers so; a broken page of a good engine does no lasting harm."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine({"/server_info": info(), "/v1/loads": page_of(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            clock.ahead += 1.0
            engine.pages["/v1/loads"] = 503
            await until(lambda: len(events.failures) >= 5)
            assert [failure.is_doubt for _, failure in events.failures[:3]] == [True, False, False]
            assert len(events.discoveries) == 2
            assert engine.requests.count("/server_info") == 2

            engine.pages = {"/server_info": 503, "/v1/loads": 503}
            clock.ahead += 61
            await until(lambda: engine.requests.count("/server_info") >= 3)
            engine.pages["/v1/loads"] = page_of(1, 2)
            await until(lambda: len(events.samples) >= 6)

    run(story())


def test_facts_are_read_once_a_round_while_each_page_contradicts_them_anew() -> None:
    """A proxy may answer each request with another error, the facts included."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine({"/server_info": info(), "/v1/loads": page_of(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            engine.pages["/server_info"] = 503
            statuses = itertools.cycle((500, 502, 503))

            async def another(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % next(statuses))
                await writer.drain()

            engine.pages["/v1/loads"] = another
            clock.ahead += 61
            reads = engine.requests.count("/server_info")
            await until(lambda: engine.requests.count("/v1/loads") >= 30)

            settled = sum(not failure.is_doubt for _, failure in events.failures)  # one at the end of each round
            assert engine.requests.count("/server_info") - reads <= settled + 1

    run(story())


def test_slow_page_puts_no_engine_in_doubt() -> None:
    """It only makes the facts due."""

    async def story() -> None:
        async with (
            ScriptedEngine({"/server_info": info(), "/v1/loads": page_of(1, 2)}) as engine,
            scraping(endpoint(engine.url), load=settings(timeout="100ms")) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            engine.pages["/v1/loads"] = hang
            await until(lambda: engine.requests.count("/server_info") >= 2)

            assert events.kinds() == {FailureKind.TIMEOUT}
            assert not any(failure.is_doubt for _, failure in events.failures)

    run(story())


def test_legs_that_failed_have_the_facts_read_between_rounds() -> None:
    """A refused rank puts the engine in doubt at once; a failed leg does not. Thousands of them are one read."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url), load=settings(interval="30s", stale_after="60s"), clock=clock) as (
                monitor,
                events,
            ),
        ):
            await until(lambda: events.samples)
            clock.ahead += 2.0
            for _ in range(1000):
                monitor.suspect(engine.url)
            await until(lambda: engine.requests.count("/server_info") == 2)
            assert events.failures == []

            clock.ahead += 2.0
            for _ in range(1000):
                monitor.contradicted(engine.url, "another engine")
            assert {failure.is_doubt for _, failure in events.failures} == {True}
            await until(lambda: engine.requests.count("/server_info") == 3)
            await until(lambda: len(events.discoveries) == 3)
            monitor.suspect("http://unknown:1")

    run(story())


def test_legs_that_fail_at_a_dead_engine_do_not_have_it_read_without_pause() -> None:
    """Its facts are due all the time, and each read of it ends at once."""

    async def story() -> None:
        url = f"http://127.0.0.1:{free_port()}"
        async with scraping(endpoint(url), clock=lambda: 100.0) as (monitor, events):
            await until(lambda: events.failures)
            for _ in range(50):
                monitor.suspect(url)
                await asyncio.sleep(0.002)

            assert len(events.failures) == 1

    run(story())


def test_readiness_is_read_between_rounds_that_are_far_apart() -> None:
    """An engine that ends gets no request for long, whatever the interval is."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy() | {"/ready": b""}) as engine,
            scraping(endpoint(engine.url), load=settings(interval="30s", stale_after="60s")) as (_, events),
        ):
            await until(lambda: events.samples)
            engine.pages["/ready"] = 503
            stopped = clock()
            await until(lambda: events.failures)

            assert events.kinds() == {FailureKind.NOT_READY}
            assert clock() - stopped < 2.0
            assert len(events.samples) == 1

    run(story())


def test_engine_without_a_readiness_page_joins_after_its_warm_up() -> None:
    """Before 0.5.20 /health is 503 until then, and computes a token later; it is read only of one that was away."""

    async def story() -> None:
        old = {"/server_info": info(version="0.5.9"), "/v1/loads": page_of(1, 2, version="0.5.9"), "/health": b""}
        async with (
            ScriptedEngine(dict(old)) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: len(events.samples) >= 2)
            assert "/health" not in engine.requests
            await engine.stop()
            await until(lambda: FailureKind.REFUSED in events.kinds())
            engine.pages["/health"] = 503
            seen = len(events.samples)
            await engine.start()
            await until(lambda: FailureKind.NOT_READY in events.kinds())
            assert len(events.samples) == seen
            engine.pages["/health"] = b""
            await until(lambda: len(events.samples) >= seen + 3)
            asked = engine.requests.count("/health")
            await until(lambda: len(events.samples) >= seen + 6)
            assert engine.requests.count("/health") == asked

    run(story())


def test_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Many failed rounds are one line, and their end is one."""
    caplog.set_level(logging.INFO, "dp_extproc.fleet")

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/v1/loads": 500}) as engine,
            scraping(endpoint(engine.url)) as (_, events),
        ):
            await until(lambda: len(events.failures) >= 5)
            engine.pages = healthy()
            await until(lambda: len(events.samples) >= 3)

    run(story())

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_update_replaces_endpoints_and_settings() -> None:
    """An endpoint that was removed produces no further events; one that was added is polled."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as old,
            ScriptedEngine(healthy()) as new,
            scraping(endpoint(old.url)) as (monitor, events),
        ):
            await until(lambda: events.samples)
            monitor.update([endpoint(new.url)], settings())
            seen = len(events.samples)
            await until(lambda: len(events.samples) >= seen + 3)
            assert {url for url, _ in events.samples[seen:]} == {new.url}

            monitor.update([endpoint(new.url)], settings(max_page_bytes=4096))
            await until(lambda: new.requests.count("/server_info") == 2)
            assert not events.failures

    run(story())


def test_first_round_includes_endpoints_that_were_added() -> None:
    """The start of the service waits for engines that a source has just reported."""

    async def story() -> None:
        async with ScriptedEngine(healthy()) as engine, scraping() as (monitor, events):
            await monitor.first_round.wait()
            monitor.update([endpoint(engine.url)], settings())
            assert not monitor.first_round.is_set()
            await monitor.first_round.wait()
            assert events.samples

    run(story())


def test_update_restarts_an_endpoint_with_other_settings() -> None:
    """The others are polled on."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as one,
            ScriptedEngine(healthy()) as other,
            scraping(endpoint(one.url), endpoint(other.url)) as (monitor, events),
        ):
            await until(lambda: len(events.discoveries) == 2)
            monitor.update([endpoint(one.url, dp_size=2), endpoint(other.url)], settings())
            await until(lambda: len(events.discoveries) == 3)

            assert [url for url, _, _ in events.discoveries].count(one.url) == 2

    run(story())
