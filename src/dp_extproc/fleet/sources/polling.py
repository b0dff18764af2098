"""Polls one engine in rounds: its facts when they are due, then its load."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.adapter import adapter_of, assumed_facts, read_facts
from dp_extproc.engines.agreement import as_single_rank, disagreement, page_of_single_rank, without_unknown_ranks
from dp_extproc.engines.listener import AWAY, GONE, EngineFailure, EngineListener, FailureKind
from dp_extproc.engines.model import EngineFacts, LoadState
from dp_extproc.engines.pages import ReaderError
from dp_extproc.fleet.sources.http import EngineClient

FACTS_EVERY: Final = 60.0
"""Seconds between two reads of the facts of an engine, each with a look-up of its name."""
OVERRIDES_EVERY: Final = 5.0
"""Seconds between two reads of the facts while it is unknown whether the needed ``x-override-*`` headers are obeyed."""
READY_EVERY: Final = 2.0
"""Seconds between two reads of the readiness of an engine that is ready. SGLang that gets SIGTERM is not ready at once,
and looks every 5 seconds whether it may end. A joining engine is read in every round."""

_NOW: Final = -math.inf
"""A time that has passed on any clock."""


class EnginePoller:
    """Reads one engine round by round, and emits what it finds as engine events."""

    def __init__(
        self, engine: EngineClient, source: LoadSource, listener: EngineListener, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._endpoint = engine.endpoint
        self._source = source
        self._load = LoadState(source)
        self._listener = listener
        self._clock = clock
        self._facts: EngineFacts | None = None
        self._facts_failure: EngineFailure | None = None
        self._facts_due = _NOW
        self._has_news = False
        """Whether facts were read, or the engine became not ready, since it was discovered last."""
        self._is_joining = True
        """Whether the engine was not ready yet since it was found, or found again."""
        self._not_ready: EngineFailure | None = None
        self._ready_due = _NOW
        self._was_gone = False
        """Whether nothing listened there at some time since ``x-override-*`` headers were probed last with a result."""

    @property
    def source(self) -> LoadSource:
        """Which page is read for the load at present: ``LOADS`` or ``METRICS``."""
        return self._load.source

    async def round(self) -> EngineFailure | None:
        """Read the engine once. Returns the failure of the round, if there is one; the listener got it, too."""
        if self._clock() >= self._facts_due:
            self._facts_failure = await self._discover()
        failure = self._facts_failure
        if self._facts is not None and (failure is None or failure.kind not in GONE):
            failure = await self._read(self._facts)
            if failure is not None and failure.is_away:
                self._facts_due = self._ready_due = _NOW
        else:
            self._facts_due = _NOW
        if failure is not None:
            self._listener.failed(self._endpoint, failure, self._clock())
        return failure

    async def _read(self, facts: EngineFacts) -> EngineFailure | None:
        """Read whether the engine is ready, and its load. An engine that was never ready has its facts alone read."""
        if self._clock() >= self._ready_due:
            self._not_ready = await self._read_readiness(facts)
        if self._not_ready is not None and self._is_joining:
            return self._not_ready
        if self._not_ready is None and self._has_news:
            self._is_joining = self._has_news = False
            self._listener.discovered(self._endpoint, self._engine.address, facts, self._clock())
        failure = await self._sample(facts)
        # Facts that cannot be read do not keep the load from being read; they are read again when they are due.
        beside = self._not_ready or self._facts_failure
        return replace(beside, page_was_read=True) if failure is None and beside is not None else failure

    async def _read_readiness(self, facts: EngineFacts) -> EngineFailure | None:
        """Read whether the engine takes requests; None if it does.

        An engine without the page counts as ready, whatever it or a proxy answers in its place (404, or 401 or 403).
        """
        page = adapter_of(facts.kind).ready_page
        self._ready_due = _NOW
        try:
            await self._engine.get(page)
        except ReaderError as error:
            if error.status is None:  # of an engine that was ready, the load page shows what is wrong
                return EngineFailure(error.kind, str(error)) if self._is_joining else None
            if error.status >= 500:
                self._has_news = True  # it is discovered anew when it is ready
                message = f"{page} answered {error.status}: the engine starts, is paused or shuts down"
                return EngineFailure(FailureKind.NOT_READY, message)
            self._ready_due = self._clock() + FACTS_EVERY  # each such answer costs a connection
        else:
            self._ready_due = self._clock() + READY_EVERY
        return None

    async def _discover(self) -> EngineFailure | None:
        may_be_another = self._facts_due == _NOW  # it was away, or it was never read
        self._facts_due = self._clock() + FACTS_EVERY
        failure = None
        try:
            await self._engine.resolve()
            facts = self._with_overrides(await read_facts(self._engine, self._endpoint))
        except ReaderError as error:
            failure = EngineFailure(error.kind, str(error))
            self._was_gone = self._was_gone or failure.kind in GONE
            assumed = assumed_facts(self._endpoint)
            if failure.kind in AWAY or self._facts is not None or assumed is None:
                return failure
            facts = assumed
        facts = as_single_rank(facts, self._endpoint)
        if may_be_another or facts != self._facts:
            self._load = LoadState(self._source)
        if may_be_another:
            self._is_joining, self._ready_due = True, _NOW
        self._facts = facts
        self._has_news = True
        return failure

    def _with_overrides(self, facts: EngineFacts) -> EngineFacts:
        """Keep the last finding about ``x-override-*`` headers if this read left it open and the engine stayed."""
        if not self._endpoint.needs_overrides:
            return facts
        if facts.reads_overrides is not None:
            self._was_gone = False
        elif self._facts is not None and not self._was_gone:
            facts = replace(facts, reads_overrides=self._facts.reads_overrides)
        if facts.reads_overrides is None:
            self._facts_due = self._clock() + OVERRIDES_EVERY
        return facts

    async def _sample(self, facts: EngineFacts) -> EngineFailure | None:
        started = self._clock()
        try:
            page = await adapter_of(facts.kind).load(self._engine, self._endpoint, facts, self._load, started)
        except ReaderError as error:
            self._was_gone = self._was_gone or error.kind in GONE
            return EngineFailure(error.kind, str(error))
        page = page_of_single_rank(page, facts)
        self._listener.sampled(self._endpoint, without_unknown_ranks(page, facts), started, self._clock())
        differs = disagreement(self._endpoint, facts, page)
        return None if differs is None else replace(differs, page_was_read=True)
