"""Polls every endpoint in a task of its own, so that an engine that hangs delays no other."""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from dp_extproc.background import Guard
from dp_extproc.config.load import LoadSettings
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineListener, EngineListeners, internal_failure
from dp_extproc.engines.model import Endpoint
from dp_extproc.fleet.discovery.membership import Membership, membership
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.fleet.sources.polling import EnginePoller

_JITTER: Final = 0.1
"""Share of the interval by which rounds are moved at random. Without it all engines would be read at the same time."""
_START_SECONDS: Final = 0.005
"""Seconds between the starts of two endpoints. Starting hundreds at once would hold up requests."""
_TASK: Final = "scrape"
"""Name of a task in the log and the metrics."""


@dataclass(frozen=True, slots=True)
class _Polled:
    """An endpoint that is polled, and the event by which its next round begins at once."""

    poller: EnginePoller
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class FleetMonitor:
    """Emits the engine events of every endpoint: address, facts, load and failures."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        settings: LoadSettings,
        listeners: Iterable[EngineListener],
        *,
        clock: Callable[[], float],
        rng: random.Random,
        guard: Guard,
        credentials: Credentials = NO_CREDENTIALS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Set up; nothing is read before :meth:`run`.

        Listeners get every event in this order, so the load cache comes first. The clock counts monotonic seconds. The
        guard is over the task of each endpoint, and gets what listeners raise.
        """
        self.first_round = asyncio.Event()
        """Set while every endpoint has answered or failed at least once."""
        self._endpoints = {endpoint.url: endpoint for endpoint in endpoints}
        self._settings = settings
        self._listeners = EngineListeners(tuple(listeners), self._report)
        self._clock = clock
        self._rng = rng
        self._guard = guard
        self._credentials = credentials
        self._tls = tls
        self._awaited = set(self._endpoints)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._polled: dict[str, _Polled] = {}
        self._changed = asyncio.Event()

    def update(self, endpoints: Iterable[Endpoint], settings: LoadSettings) -> None:
        """Replace the endpoints and the settings. Endpoints that were removed produce no further events."""
        if settings != self._settings:
            self._settings = settings
            self._stop(tuple(self._tasks))
        self.apply(membership(self._endpoints.values(), endpoints))

    def apply(self, change: Membership) -> None:
        """Poll the endpoints that were added, as configured now those that were updated, and no longer the removed."""
        self._stop(each.url for each in (*change.updated, *change.removed))
        for endpoint in change.removed:
            del self._endpoints[endpoint.url]
        self._endpoints.update({each.url: each for each in (*change.added, *change.updated)})
        self._awaited = self._awaited & self._endpoints.keys() | {each.url for each in change.added}
        if self._awaited:
            self.first_round.clear()
        self._changed.set()

    def suspect(self, url: str) -> None:
        """Read the facts of an engine at once, because a leg has failed at it."""
        if (polled := self._polled.get(url)) is not None:
            polled.poller.suspect()
            polled.wake.set()

    def contradicted(self, url: str, why: str) -> None:
        """Read the facts of an engine before it gets another request, as it answered one as another engine would."""
        if (polled := self._polled.get(url)) is not None:
            polled.poller.contradicted(why)
            polled.wake.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        self._tasks.clear()  # the tasks of a run that has failed ended with it
        async with asyncio.TaskGroup() as group:
            while True:
                if not self._awaited:
                    self.first_round.set()
                for url in [url for url in self._endpoints if url not in self._tasks]:
                    # Each start may be the last act for an endpoint that was removed or replaced in the meantime.
                    if (endpoint := self._endpoints.get(url)) is not None and url not in self._tasks:
                        poll = self._guard.keep(_TASK, partial(self._poll, endpoint), url)
                        self._tasks[url] = group.create_task(poll, name=f"{_TASK} {url}")
                        await asyncio.sleep(_START_SECONDS)
                await self._changed.wait()
                self._changed.clear()

    def _stop(self, urls: Iterable[str]) -> None:
        for url in urls:
            self._polled.pop(url, None)
            if (task := self._tasks.pop(url, None)) is not None:
                task.cancel()

    async def _poll(self, endpoint: Endpoint) -> None:
        async with make_client(self._tls) as client:
            await self._read(endpoint, EngineClient(endpoint, self._settings, client, self._credentials))

    async def _read(self, endpoint: Endpoint, engine: EngineClient) -> None:
        poller = EnginePoller(engine, self._settings.source, self._listeners, self._clock)
        polled = self._polled[endpoint.url] = _Polled(poller)
        while True:
            polled.wake.clear()
            pause = self._settings.interval * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
            due = self._clock() + pause
            try:
                await poller.round()
                self._tried(endpoint)
                while (now := self._clock()) < due:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(0.0, min(due, poller.ready_due) - now)):
                            await polled.wake.wait()
                    if polled.wake.is_set():
                        polled.wake.clear()
                        due = min(due, max(self._clock(), poller.facts_due))
                    elif self._clock() >= poller.ready_due:
                        await poller.watch()
            except Exception as error:
                self._listeners.failed(endpoint, internal_failure(error), self._clock())
                self._tried(endpoint)
                raise

    def _tried(self, endpoint: Endpoint) -> None:
        self._awaited.discard(endpoint.url)
        if not self._awaited:
            self.first_round.set()

    def _report(self, endpoint: Endpoint, error: Exception) -> None:
        self._guard.report(_TASK, error, endpoint.url, then="goes on")
