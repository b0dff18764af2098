"""The tasks of sources: started once, guarded, and ended when the configuration has them no longer."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from dp_extproc.background import Guard
from dp_extproc.config import parse_config
from dp_extproc.engines.model import Role, SourceKind
from dp_extproc.fleet.discovery.log import DiscoveryLog
from dp_extproc.fleet.discovery.roster import Change, Place, RoleSource
from dp_extproc.fleet.discovery.runner import Discovery
from dp_extproc.fleet.discovery.source import Member, SourceListener
from dp_extproc.fleet.discovery.sources import role_sources

DECODE = Place("m", Role.DECODE)


class Scripted:
    """A source that reports what a test hands in."""

    kind = SourceKind.DNS
    keep_for = 30.0

    def __init__(self, *, fails: bool = False) -> None:
        self.runs = 0
        self.is_cancelled = False
        self.listener: SourceListener | None = None
        self._fails = fails

    async def run(self, listener: SourceListener) -> None:
        self.runs += 1
        if self._fails and self.runs == 1:
            raise RuntimeError("unexpected")
        self.listener = listener
        try:
            await asyncio.Event().wait()
        finally:
            self.is_cancelled = True

    async def report(self, *numbers: int) -> None:
        await until(lambda: self.listener is not None)
        assert self.listener is not None
        self.listener.snapshot(tuple(Member(f"http://10.0.0.{each}:1", f"10.0.0.{each}", 1) for each in numbers))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


def entry(name: str, source: Scripted) -> RoleSource:
    return RoleSource(name, DECODE, SourceKind.DNS, f"dns {name}", source=source)


@asynccontextmanager
async def running(*sources: RoleSource) -> AsyncIterator[tuple[Discovery, list[Change]]]:
    changes: list[Change] = []
    log = DiscoveryLog(tuple)

    def changed(change: Change) -> None:
        changes.append(change)
        log.change(change)

    found = Discovery(sources, changed=changed, reviewed=log.review, clock=time.monotonic, guard=Guard())
    task = asyncio.create_task(found.run())
    try:
        yield found, changes
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


def test_discovery_is_complete_when_each_source_has_reported_or_failed(caplog: pytest.LogCaptureFixture) -> None:
    """All of it is applied by then, and each change is one line of the log."""
    caplog.set_level(logging.INFO, "dp_extproc.fleet")

    async def story() -> None:
        one, other = Scripted(), Scripted()
        async with running(entry("one", one), entry("other", other)) as (found, changes):
            await one.report(1, 2)
            await until(lambda: changes)
            assert not found.first_reports.is_set()
            for _ in range(3):
                assert other.listener is not None
                other.listener.failed("no answer")
                await asyncio.sleep(0)
            await found.first_reports.wait()
            assert [each.host for each in found.endpoints] == ["10.0.0.1", "10.0.0.2"]
            await other.report(1)
            await until(lambda: "is listed by" in caplog.text)
            await one.report(1)
            await until(lambda: "is gone" in caplog.text)

    run(story())
    assert [record.getMessage() for record in caplog.records] == [
        "http://10.0.0.1:1 joins pool m as decode",
        "http://10.0.0.2:1 joins pool m as decode",
        "dns other fails, and its last endpoints stay: no answer",
        "dns other reports again (1 members)",
        "http://10.0.0.1:1 is listed by dns one and by dns other; the first one counts",
        "http://10.0.0.2:1 drains: it is no longer listed",
        "http://10.0.0.2:1 is gone: it has no more requests",
    ]


def test_update_runs_a_source_that_stays_and_ends_others() -> None:
    """A reload does not ask again what is known already."""

    async def story() -> None:
        stays, goes, comes = Scripted(), Scripted(), Scripted()
        async with running(entry("stays", stays), entry("goes", goes)) as (found, _):
            await stays.report(1)
            await goes.report(2)
            await found.first_reports.wait()
            await until(lambda: len(found.endpoints) == 2)
            found.update([entry("stays", Scripted()), entry("comes", comes)])
            await comes.report(3)
            await until(lambda: [each.host for each in found.endpoints] == ["10.0.0.1", "10.0.0.3"])
            assert (stays.runs, stays.is_cancelled, goes.is_cancelled) == (1, False, True)
            assert goes.listener is not None
            goes.listener.snapshot(())  # a late report of a source that is gone has no effect
            assert len(found.endpoints) == 2

    run(story())


def test_exception_of_a_source_starts_it_again() -> None:
    """The others run on."""

    async def story() -> None:
        odd, even = Scripted(fails=True), Scripted()
        async with running(entry("odd", odd), entry("even", even)) as (found, _):
            await even.report(1)
            await odd.report(2)
            await until(lambda: len(found.endpoints) == 2)
            assert (odd.runs, even.runs) == (2, 1)

    run(story())


def test_change_that_fails_is_made_again_when_discovery_begins_anew() -> None:
    """Without it, the components would have other endpoints than the roster until the next change."""

    async def story() -> None:
        source, changes = Scripted(), list[Change]()

        def changed(change: Change) -> None:
            changes.append(change)
            if len(changes) == 1:
                raise RuntimeError("unexpected")

        found = Discovery([entry("a", source)], changed=changed, clock=time.monotonic, guard=Guard())
        task = asyncio.create_task(found.run())
        await source.report(1)
        with pytest.raises(ExceptionGroup, match="unhandled errors"):
            await task
        task = asyncio.create_task(found.run())
        await until(lambda: len(changes) == 2 and source.runs == 2)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert [[each.host for each in change.endpoints] for change in changes] == [["10.0.0.1"]] * 2

    run(story())


def test_sources_keep_their_keys_across_a_reload() -> None:
    """A pool that gets another model has another name, but the same sources; other settings are another source."""
    text = """
pools:
- models: [MODELS]
  prefill: {endpoints: ["http://10.0.0.1:1"], file: {path: /a}}
  decode: {dns: {name: decode.llm, port: 1, interval: INTERVAL}, kubernetes: {service: decode}}
"""

    def keys(models: str, interval: str) -> list[object]:
        config = parse_config(text.replace("MODELS", models).replace("INTERVAL", interval))
        return [source.key for source in role_sources(config)]

    before, renamed, changed = keys("m", "1s"), keys("m, n", "1s"), keys("m", "2s")
    assert before == renamed
    assert [one == other for one, other in zip(before, changed, strict=True)] == [True, True, False, True]
    assert len(set(before)) == 4
