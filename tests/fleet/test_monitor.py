"""The scraper against HTTP servers on real sockets, well-behaved and not."""

import asyncio
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
class Notes:
    """An observer that writes everything down."""

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
    """Monotonic time that can be put forward."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@asynccontextmanager
async def scraping(
    *endpoints: Endpoint,
    load: LoadSettings | None = None,
    clock: Callable[[], float] = time.monotonic,
    guard: Guard | None = None,
    notes: Notes | None = None,
) -> AsyncIterator[tuple[FleetMonitor, Notes]]:
    """Run a monitor for as long as the block lasts."""
    notes = notes or Notes()
    monitor = FleetMonitor(
        endpoints,
        load or settings(),
        (notes, EngineLog(logging.getLogger("dp_extproc.fleet"))),
        clock=clock,
        rng=random.Random(1),
        guard=guard or Guard(),
    )
    task = asyncio.create_task(monitor.run())
    try:
        yield monitor, notes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled(), task.exception()


def test_healthy_engine() -> None:
    """An engine is discovered once, then its load is told again and again over one connection."""

    async def story() -> None:
        pages = healthy() | {"/server_info": info(enable_metrics=False)}
        async with ScriptedEngine(pages) as engine, scraping(endpoint(engine.url)) as (monitor, notes):
            await until(lambda: len(notes.samples) >= 5)

            assert monitor.first_round.is_set()
            assert [(url, address, facts.dp_ranks) for url, address, facts in notes.discoveries] == [
                (engine.url, f"127.0.0.1:{engine.port}", 2)
            ]
            assert set(map(tuple, notes.used())) == {(10, 20)}
            assert all(started <= now for started, now in notes.times)
            assert not notes.failures
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
def test_one_bad_engine(path: str, answer: Answer, load: dict[str, object], kind: FailureKind) -> None:
    """Whatever one engine does on a page, it is said what is wrong, and the other engine is read as before."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as good,
            ScriptedEngine(healthy() | {path: answer}) as bad,
            scraping(endpoint(good.url), endpoint(bad.url), load=settings(**load)) as (monitor, notes),
        ):
            await until(lambda: len(notes.failures_of(bad.url)) >= 2)
            await monitor.first_round.wait()
            seen = len(notes.samples)
            await until(lambda: len(notes.samples) >= seen + 3)

            assert {failure.kind for failure in notes.failures_of(bad.url)} == {kind}
            assert all(path in failure.message for failure in notes.failures_of(bad.url))
            assert {url for url, _ in notes.samples} == {good.url}

    run(story())


def test_refused() -> None:
    """Nobody listens: that is said, and the first round is over all the same."""

    async def story() -> None:
        async with scraping(endpoint(f"http://127.0.0.1:{free_port()}")) as (monitor, notes):
            await monitor.first_round.wait()

            assert notes.kinds() == {FailureKind.REFUSED}
            assert not notes.discoveries

    run(story())


def test_unresolvable() -> None:
    """A name without an address is said to be one."""

    async def story() -> None:
        async with scraping(endpoint("http://no-such-engine.invalid:30000")) as (monitor, notes):
            await monitor.first_round.wait()

            assert notes.kinds() == {FailureKind.UNRESOLVABLE}

    run(story())


def test_name_is_resolved_and_asked_under_its_own() -> None:
    """A host name becomes an IPv4 address for Envoy; the engine is asked at that address, under its name."""

    async def story() -> None:
        async with ScriptedEngine(healthy()) as engine:
            named = endpoint(f"http://localhost:{engine.port}")
            async with scraping(named) as (_, notes):
                await until(lambda: notes.samples)

                assert notes.discoveries[0][1] == f"127.0.0.1:{engine.port}"
                assert engine.host_headers == {f"localhost:{engine.port}"}

    run(story())


def test_address_is_kept_while_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several addresses an IPv4 one is taken and kept, in whatever order they come, until it is gone."""

    async def story() -> None:
        answers: list[str] = []

        async def look_up(host: str, port: int, **more: object) -> list[Any]:
            families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in answers]
            return [(family, 1, 6, "", (each, port)) for family, each in zip(families, answers, strict=True)]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
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


def test_ipv6_literal() -> None:
    """An IPv6 address stays one, in brackets."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback on this machine")

    async def story() -> None:
        async with (
            ScriptedEngine(healthy(), host="::1") as engine,
            scraping(endpoint(f"http://[::1]:{engine.port}")) as (_, notes),
        ):
            await until(lambda: notes.samples)

            assert notes.discoveries[0][1] == f"[::1]:{engine.port}"
            assert engine.host_headers == {f"[::1]:{engine.port}"}

    run(story())


def test_auto_falls_back_to_metrics() -> None:
    """An engine without /v1/loads is read on /metrics, and not asked for the other page every round."""

    async def story() -> None:
        pages: dict[str, Answer] = {"/server_info": info(), "/metrics": metrics(1, 2)}
        async with ScriptedEngine(pages) as engine, scraping(endpoint(engine.url)) as (_, notes):
            await until(lambda: len(notes.samples) >= 4)

            assert notes.used()[0] == [1, 2]
            assert notes.samples[0][1].prompt_tokens == 77
            assert engine.requests.count("/v1/loads") == 1
            assert not notes.failures

    run(story())


def test_engine_that_comes_back_newer() -> None:
    """After a restart the engine is asked anew who it is, and for the better page."""

    async def story() -> None:
        old: dict[str, Answer] = {"/get_server_info": info(version="0.5.5"), "/metrics": metrics(1, 2)}
        engine = ScriptedEngine(old)
        async with engine, scraping(endpoint(engine.url)) as (_, notes):
            await until(lambda: notes.samples)
            await engine.stop()
            await until(lambda: FailureKind.REFUSED in notes.kinds())
            engine.pages = {"/server_info": info(4), "/v1/loads": loads(5, 6, 7, 8)}
            await engine.start()
            await until(lambda: [5, 6, 7, 8] in notes.used())

            assert [str(facts.version) for _, _, facts in notes.discoveries] == ["0.5.5", "0.5.23"]

    run(story())


@pytest.mark.parametrize(
    ("source", "pages", "part"),
    [
        pytest.param(LoadSource.LOADS, {"/metrics": metrics(1, 2)}, "load.source", id="loads"),
        pytest.param(LoadSource.METRICS, {"/v1/loads": loads(1, 2)}, "--enable-metrics", id="metrics"),
        pytest.param(LoadSource.AUTO, {}, "--enable-metrics", id="neither"),
    ],
)
def test_missing_source(source: LoadSource, pages: dict[str, Answer], part: str) -> None:
    """A load source that the engine does not have is a failure with its remedy; no other source is used instead."""

    async def story() -> None:
        async with (
            ScriptedEngine({"/server_info": info()} | pages) as engine,
            scraping(endpoint(engine.url), load=settings(source=source.value)) as (_, notes),
        ):
            await until(lambda: len(notes.failures) >= 3)

            assert notes.kinds() == {FailureKind.HTTP_STATUS}
            assert part in notes.failures[0][1].message
            assert not notes.samples
            assert len(notes.discoveries) == 1

    run(story())


def test_prompt_tokens_come_from_metrics_now_and_then() -> None:
    """With /v1/loads as the source, /metrics is read for the prompt tokens once in a while, not every round."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/metrics": metrics(1, 2)}) as engine,
            scraping(endpoint(engine.url)) as (_, notes),
        ):
            await until(lambda: len(notes.samples) >= 4)

            assert [page.prompt_tokens for _, page in notes.samples[:3]] == [77, None, None]
            assert engine.requests.count("/metrics") == 1

    run(story())


def test_prompt_tokens_are_read_again() -> None:
    """After ten seconds the prompt tokens are read once more."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy() | {"/metrics": metrics(1, 2)}) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, notes),
        ):
            await until(lambda: len(notes.samples) >= 3)
            clock.ahead += 11
            await until(lambda: [page.prompt_tokens for _, page in notes.samples].count(77) == 2)

            assert engine.requests.count("/server_info") == 1

    run(story())


def test_engine_that_changed_unnoticed() -> None:
    """Within a minute it shows that an engine has become another, even if it was never seen to be away."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, notes),
        ):
            await until(lambda: notes.samples)
            engine.pages = healthy() | {"/server_info": info(version="0.5.24")}
            clock.ahead += 61
            await until(lambda: len(notes.discoveries) == 2)

            assert str(notes.discoveries[1][2].version) == "0.5.24"
            assert not notes.failures

    run(story())


def test_known_engine_whose_facts_cannot_be_read_anymore() -> None:
    """A /server_info that fails later is said, and asked again a minute later; the load is read on."""

    async def story() -> None:
        clock = Clock()
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url), clock=clock) as (_, notes),
        ):
            await until(lambda: notes.samples)
            engine.pages = healthy() | {"/server_info": 503}
            clock.ahead += 61
            await until(lambda: notes.failures)
            seen = len(notes.samples)
            await until(lambda: len(notes.samples) >= seen + 3)

            assert notes.kinds() == {FailureKind.HTTP_STATUS}
            assert engine.requests.count("/server_info") == 2

            engine.pages = healthy()
            clock.ahead += 61
            await until(lambda: len(notes.discoveries) == 2)

    run(story())


def test_prompt_tokens_are_dispensable() -> None:
    """A /metrics page that cannot be read spoils no sample."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/metrics": b"\xff"}) as engine,
            scraping(endpoint(engine.url)) as (_, notes),
        ):
            await until(lambda: len(notes.samples) >= 2)

            assert not notes.failures

    run(story())


@pytest.mark.parametrize(
    ("page", "kept"),
    [
        pytest.param(loads(1, 2, 3), [1, 2], id="too-many"),
        pytest.param(loads(1), [1], id="too-few"),
    ],
)
def test_ranks_disagree(page: bytes, kept: list[int]) -> None:
    """Ranks that /server_info does not know never reach the observer, and the difference is said."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/v1/loads": page}) as engine,
            scraping(endpoint(engine.url)) as (_, notes),
        ):
            await until(lambda: notes.failures and len(notes.samples) >= 2)

            assert notes.kinds() == {FailureKind.DISAGREEMENT}
            assert set(map(tuple, notes.used())) == {tuple(kept)}

    run(story())


def test_configured_ranks_disagree() -> None:
    """/server_info wins over a configured dp_size, and the difference is said."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url, dp_size=8)) as (_, notes),
        ):
            await until(lambda: notes.failures)

            assert notes.discoveries[0][2].dp_ranks == 2
            assert notes.kinds() == {FailureKind.DISAGREEMENT}
            assert "dp_size is 8" in notes.failures[0][1].message

    run(story())


def test_configured_ranks_stand_in() -> None:
    """An engine that hides /server_info is used with the configured dp_size; what is wrong is still said."""

    async def story() -> None:
        async with (
            ScriptedEngine({"/v1/loads": loads(1, 2)}) as engine,
            scraping(endpoint(engine.url, Role.PREFILL, dp_size=2)) as (_, notes),
        ):
            await until(lambda: len(notes.samples) >= 2)

            (_, _, facts), *others = notes.discoveries
            assert (facts.version, facts.dp_ranks, facts.follows_rooms) == (None, 2, True)
            assert not others
            assert notes.kinds() == {FailureKind.HTTP_STATUS}

    run(story())


def test_wrong_role() -> None:
    """An engine whose mode is not the one of its role in the configuration is said to be so."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as engine,
            scraping(endpoint(engine.url, Role.DECODE)) as (_, notes),
        ):
            await until(lambda: notes.failures)

            assert notes.kinds() == {FailureKind.DISAGREEMENT}
            assert "--disaggregation-mode decode" in notes.failures[0][1].message

    run(story())


class Unsound(Notes):
    """An observer that fails over one engine until it is mended."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.fails_over = url

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        if endpoint.url == self.fails_over:
            raise ZeroDivisionError("float division by zero")
        super().sampled(endpoint, page, started, now)


def test_a_fault_of_ours_over_one_engine_concerns_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """The others are read on; this one is told as trouble, counted and tried again, until all is well."""

    async def story() -> None:
        async with ScriptedEngine(healthy()) as odd, ScriptedEngine(healthy()) as even:
            guard, notes = Guard(), Unsound(odd.url)
            async with scraping(endpoint(odd.url), endpoint(even.url), guard=guard, notes=notes) as (monitor, _):
                await monitor.first_round.wait()
                await until(lambda: guard.failures["scrape"] >= 2)
                seen = len(notes.samples)
                await until(lambda: len(notes.samples) >= seen + 5)
                assert notes.kinds() == {FailureKind.INTERNAL}
                assert notes.failures_of(even.url) == []
                notes.fails_over = ""
                await until(lambda: odd.url in {url for url, _ in notes.samples})

    run(story())
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert next(each.getMessage() for each in caplog.records if "internal" in each.getMessage()).endswith("see the log")


def test_trouble_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Many failed rounds are one line, and their end is one."""
    caplog.set_level(logging.INFO, "dp_extproc.fleet")

    async def story() -> None:
        async with (
            ScriptedEngine(healthy() | {"/v1/loads": 500}) as engine,
            scraping(endpoint(engine.url)) as (_, notes),
        ):
            await until(lambda: len(notes.failures) >= 5)
            engine.pages = healthy()
            await until(lambda: len(notes.samples) >= 3)

    run(story())

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_update_replaces_endpoints_and_settings() -> None:
    """An endpoint that was removed produces no further events; one that was added is polled."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as old,
            ScriptedEngine(healthy()) as new,
            scraping(endpoint(old.url)) as (monitor, notes),
        ):
            await until(lambda: notes.samples)
            monitor.update([endpoint(new.url)], settings())
            seen = len(notes.samples)
            await until(lambda: len(notes.samples) >= seen + 3)
            assert {url for url, _ in notes.samples[seen:]} == {new.url}

            monitor.update([endpoint(new.url)], settings(max_page_bytes=4096))
            await until(lambda: new.requests.count("/server_info") == 2)
            assert not notes.failures

    run(story())


def test_an_endpoint_whose_settings_change_is_discovered_anew() -> None:
    """The others are polled on."""

    async def story() -> None:
        async with (
            ScriptedEngine(healthy()) as one,
            ScriptedEngine(healthy()) as other,
            scraping(endpoint(one.url), endpoint(other.url)) as (monitor, notes),
        ):
            await until(lambda: len(notes.discoveries) == 2)
            monitor.update([endpoint(one.url, dp_size=2), endpoint(other.url)], settings())
            await until(lambda: len(notes.discoveries) == 3)

            assert [url for url, _, _ in notes.discoveries].count(one.url) == 2

    run(story())
