"""Runs the sources of endpoints, each in a task of its own, and applies what they report by the rules of the roster."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Final

from dp_extproc.background import Guard
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage
from dp_extproc.fleet.discovery.roster import Change, RoleSource, Roster
from dp_extproc.fleet.discovery.scheme import with_scheme
from dp_extproc.fleet.discovery.source import Member

_TASK: Final = "discovery"
"""Name of the tasks in the log and the metrics."""
_REVIEW_SECONDS: Final = 1.0
"""Longest time in seconds between two reviews."""


def _nothing(_event: object) -> None:
    pass


def _always(_endpoint: Endpoint) -> bool:
    return True


class Discovery:
    """The present endpoints. Those in the configuration itself are there from the beginning.

    Implements ``EngineListener``: an engine that was found to be ready may take the place of an endpoint.
    """

    def __init__(
        self,
        sources: Iterable[RoleSource],
        *,
        changed: Callable[[Change], None] = _nothing,
        reviewed: Callable[[Roster], None] = _nothing,
        takes_requests: Callable[[Endpoint], bool] = _always,
        clock: Callable[[], float],
        guard: Guard,
    ) -> None:
        """Set up; nothing is read before :meth:`run`.

        Args:
            sources: The configured sources, in order.
            changed: Called with each later change, except those of :meth:`update`.
            reviewed: Called after each report, and each second.
            takes_requests: Returns whether the engine of an endpoint is ready and not stale.
            clock: Returns monotonic seconds.
            guard: Is over the task of each source.
        """
        self.roster = Roster(takes_requests)
        self.first_reports = asyncio.Event()
        """Set when each source has reported or failed once, and all of it is applied."""
        self._changed = changed
        self._reviewed = reviewed
        self._clock = clock
        self._guard = guard
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self.roster.configure(sources, clock())

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self.roster.endpoints

    def update(self, sources: Iterable[RoleSource]) -> Change:
        """Change to other sources. A source that keeps its key runs on, all others are started or ended."""
        change = self.roster.configure(sources, self._clock())
        for key in self._tasks.keys() - self.roster.sources.keys():
            self._tasks.pop(key).cancel()
        self._wake.set()
        return change

    async def run(self) -> None:
        """Run the sources until cancelled."""
        if self._tasks:  # a run has failed, maybe in the midst of a change; its tasks ended with it
            self._tasks.clear()
            self._changed(Change(self.endpoints))
        async with asyncio.TaskGroup() as group:
            while True:
                for key, source in self.roster.sources.items():
                    if source.source is not None and key not in self._tasks:
                        work = partial(source.source.run, _Listener(self.roster, source, self._clock, self._wake))
                        task = self._guard.keep(_TASK, work, source.name)
                        self._tasks[key] = group.create_task(task, name=f"{_TASK} {source.name}")
                if (change := self.roster.advance(self._clock())) is not None:
                    self._changed(change)
                self._reviewed(self.roster)
                if self.roster.is_complete:
                    self.first_reports.set()
                pause = min(max(0.0, self.roster.due - self._clock()), _REVIEW_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                self._wake.clear()

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Consider that the engine takes requests."""
        self._reconsider()

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Consider that the engine takes requests again."""
        self._reconsider()

    def _reconsider(self) -> None:
        if self.roster.reconsider():
            self._wake.set()

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Do nothing: an engine that fails stays an endpoint."""


class _Listener:
    """Gets the reports of one source."""

    def __init__(self, roster: Roster, source: RoleSource, clock: Callable[[], float], wake: asyncio.Event) -> None:
        self._roster = roster
        self._source = source
        self._clock = clock
        self._wake = wake

    def snapshot(self, members: tuple[Member, ...]) -> None:
        found = with_scheme(members, self._source.kind, has_tls=self._source.place.has_tls)
        if isinstance(found, str):
            self.failed(found)
            return
        self._roster.snapshot(self._source.key, found)
        self._wake.set()

    def failed(self, message: str) -> None:
        self._roster.failed(self._source.key, message, self._clock())
        self._wake.set()


async def first_reports(sources: Iterable[RoleSource], seconds: float) -> Roster:
    """Run sources until each has reported or failed once, for a limited time. A source without a report is pending."""
    discovery = Discovery(sources, clock=time.monotonic, guard=Guard())
    running = asyncio.create_task(discovery.run())
    try:
        async with asyncio.timeout(seconds):
            await discovery.first_reports.wait()
    except TimeoutError:
        pass
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return discovery.roster
