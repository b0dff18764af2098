"""Watches the engines: one task per endpoint, so that one that hangs slows nobody else."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import Final

import httpx

from dp_extproc.config.schema import LoadSettings
from dp_extproc.fleet.endpoint import Endpoint
from dp_extproc.fleet.engine_client import EngineClient, make_client
from dp_extproc.fleet.observer import FleetObserver
from dp_extproc.fleet.trouble import TroubleLog
from dp_extproc.fleet.watch import EngineWatch

_JITTER: Final = 0.1
"""Share of the interval by which rounds are moved, or all engines of a fleet would be read in the same moment."""

logger = logging.getLogger(__name__)


class Scraper:
    """Keeps an observer informed of every endpoint's address, facts and load."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        settings: LoadSettings,
        observer: FleetObserver,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        """Set up; nothing is asked before :meth:`run`.

        Args:
            endpoints: Whom to watch.
            settings: How.
            observer: Whom to tell.
            clock: Monotonic seconds; what the observer is told.
            rng: For the jitter.
            client: To ask with, left open at the end; by default an own one.
        """
        self.first_round = asyncio.Event()
        """Set when every endpoint has answered or failed once."""
        self._endpoints = tuple(endpoints)
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._rng = rng
        self._client = client
        self._troubles = TroubleLog(logger)
        self._awaited = {endpoint.url for endpoint in self._endpoints}

    async def run(self) -> None:
        """Watch until cancelled."""
        async with AsyncExitStack() as stack:
            client = self._client
            if client is None:
                client = await stack.enter_async_context(make_client())
            if not self._awaited:
                self.first_round.set()
            async with asyncio.TaskGroup() as group:
                for endpoint in self._endpoints:
                    group.create_task(self._watch(endpoint, client), name=f"scrape {endpoint.url}")

    async def _watch(self, endpoint: Endpoint, client: httpx.AsyncClient) -> None:
        engine = EngineClient(endpoint, self._settings, client)
        watch = EngineWatch(engine, self._settings.source, self._observer, self._clock)
        while True:
            started = self._clock()
            failure = await watch.round()
            self._troubles.note(endpoint.url, failure)
            self._awaited.discard(endpoint.url)
            if not self._awaited:
                self.first_round.set()
            pause = self._settings.interval * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(max(0.0, pause - (self._clock() - started)))
