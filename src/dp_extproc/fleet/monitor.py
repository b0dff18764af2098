"""Watches the engines: one task per endpoint, so that one that hangs slows nobody else."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

import httpx

from dp_extproc.background import Guard
from dp_extproc.config.load import LoadSettings
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineFailure, EngineListener, unexpected
from dp_extproc.engines.model import Endpoint
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.fleet.sources.polling import EngineWatch
from dp_extproc.observability.log import DiagnosticLog, EndpointStateLog, PairLog

_JITTER: Final = 0.1
"""Share of the interval by which rounds are moved, or all engines of a fleet would be read in the same moment."""

logger = logging.getLogger(__name__)


class Scraper:
    """Keeps an observer informed of every endpoint's address, facts and load."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        settings: LoadSettings,
        observer: EngineListener,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        guard: Guard,
        client: httpx.AsyncClient | None = None,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """Set up; nothing is asked before :meth:`run`.

        Args:
            endpoints: Whom to watch.
            settings: How.
            observer: Whom to tell.
            clock: Monotonic seconds; what the observer is told.
            rng: For the jitter.
            guard: Over the task of each endpoint.
            client: To ask with, left open at the end; by default an own one.
            credentials: What engines are shown.
        """
        self.first_round = asyncio.Event()
        """Set when every endpoint has answered or failed once."""
        self._endpoints = tuple(endpoints)
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._rng = rng
        self._guard = guard
        self._client = client
        self._credentials = credentials
        self._troubles = EndpointStateLog(logger)
        self._traps = DiagnosticLog(logger)
        self._pairs = PairLog(logger)
        self._awaited = {endpoint.url for endpoint in self._endpoints}
        self._watches: dict[Endpoint, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def update(self, endpoints: Iterable[Endpoint], settings: LoadSettings) -> None:
        """Watch others, or otherwise, from now on. Nobody is told any more of those that are left out."""
        again = settings != self._settings
        self._endpoints = tuple(endpoints)
        self._settings = settings
        for endpoint in [each for each in self._watches if again or each not in self._endpoints]:
            self._watches.pop(endpoint).cancel()
        urls = {endpoint.url for endpoint in self._endpoints}
        self._awaited &= urls
        self._troubles.forget_all_but(urls)
        self._pairs.forget_all_but(self._endpoints)
        self._changed.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._watches.clear()  # those of a run that has failed have ended with it
        async with AsyncExitStack() as stack:
            client = self._client
            if client is None:
                client = await stack.enter_async_context(make_client())
            group = await stack.enter_async_context(asyncio.TaskGroup())
            while True:
                if not self._awaited:
                    self.first_round.set()
                for endpoint in self._endpoints:
                    if endpoint not in self._watches:
                        watch = self._guard.keep("scrape", partial(self._watch, endpoint, client), endpoint.url)
                        self._watches[endpoint] = group.create_task(watch, name=f"scrape {endpoint.url}")
                await self._changed.wait()
                self._changed.clear()

    async def _watch(self, endpoint: Endpoint, client: httpx.AsyncClient) -> None:
        engine = EngineClient(endpoint, self._settings, client, self._credentials)
        watch = EngineWatch(engine, self._settings.source, self._observer, self._clock)
        facts = None
        while True:
            started = self._clock()
            try:
                failure = await watch.round()
            except Exception as error:
                self._tried(endpoint, unexpected(error))
                self._observer.failed(endpoint, unexpected(error), self._clock())
                raise
            if watch.facts is not None and watch.facts is not facts:
                facts = watch.facts
                self._traps.note(endpoint, facts)
                self._pairs.note(endpoint, facts)
            self._tried(endpoint, failure)
            pause = self._settings.interval * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(max(0.0, pause - (self._clock() - started)))

    def _tried(self, endpoint: Endpoint, failure: EngineFailure | None) -> None:
        self._troubles.note(endpoint.url, failure)
        self._awaited.discard(endpoint.url)
        if not self._awaited:
            self.first_round.set()
