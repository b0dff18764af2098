"""Polls one engine in rounds: its readiness and its facts when they are due, then its load.

Another engine may come to stand behind an address: a restart, an upgrade, the next one of a Service. By the facts of
the last one, requests would name ranks that this one does not have. So facts are read again before they are due:

1. A page that contradicts the facts (its ranks, its release, its role), counts that fell, and an answer of 500 or more
   in place of the page put the engine in doubt. It gets no request while there are others, and its facts are read in
   the same round. The doubt ends with them, or with a page that agrees with the facts.
2. A failed leg, a refused connection and a page that takes too long only make the facts due at once. They are no reason
   to leave out an engine that may be slow.
3. A contradiction that the facts have outlived is none any more: an engine whose page never has all ranks is read once.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.adapter import adapter_of, assumed_facts, read_facts
from dp_extproc.engines.agreement import (
    NO_COUNTS,
    Counts,
    as_single_rank,
    contradiction,
    disagreement,
    page_of_single_rank,
    without_unknown_ranks,
)
from dp_extproc.engines.listener import AWAY, GONE, EngineFailure, EngineListener, FailureKind
from dp_extproc.engines.model import EngineFacts, LoadPage, LoadState
from dp_extproc.engines.pages import ReaderError
from dp_extproc.fleet.sources.http import EngineClient

FACTS_EVERY: Final = 60.0
"""Seconds between two reads of the facts of an engine, each with a look-up of its name."""
OVERRIDES_EVERY: Final = 5.0
"""Seconds between two reads of the facts while it is unknown whether the needed ``x-override-*`` headers are obeyed."""
READY_EVERY: Final = 1.5
"""Seconds between two reads of the readiness of an engine that is ready, whatever the interval of rounds is.

With the time of the read itself, an engine that ceases to be ready gets no request after two seconds. SGLang that gets
SIGTERM is not ready at once, and looks every 5 seconds whether it may end. A joining engine is read in every round.
"""
SUSPECT_EVERY: Final = 1.0
"""Seconds between two reads of the facts for the sake of failed legs, of which there may be thousands a second."""

_FAULTY: Final = 500
"""Status from which on an answer is a fault of the engine, or of a proxy without one."""
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
        self._is_starting = False
        """Whether nothing listened there since the engine was discovered last."""
        self._not_ready: EngineFailure | None = None
        self._ready_due = _NOW
        self._reports_readiness = False
        """Whether the page of the readiness exists, by the last read."""
        self._was_gone = False
        """Whether nothing listened there at some time since ``x-override-*`` headers were probed last with a result."""
        self._is_assumed = False
        """Whether the facts are those of the configuration, since the engine reports none."""
        self._facts_at = self._round_at = _NOW
        """When the facts were read last, with or without success, and when the last round began."""
        self._contradiction: str | None = None
        """Why the engine was last in doubt; None after a page that agrees with its facts."""
        self._is_in_doubt = False
        self._counts: Counts = NO_COUNTS

    @property
    def source(self) -> LoadSource:
        """Which page is read for the load at present: ``LOADS`` or ``METRICS``."""
        return self._load.source

    @property
    def ready_due(self) -> float:
        """When :meth:`watch` has something to do; infinite if only the next round has."""
        is_read = self._facts is not None and self._not_ready is None and not self._is_joining
        is_timed = self._reports_readiness and self._ready_due != _NOW
        return self._ready_due if is_read and is_timed else math.inf

    @property
    def facts_due(self) -> float:
        """When the facts have to be read next. Of an engine that is away this would be always."""
        return max(self._facts_due, self._facts_at + SUSPECT_EVERY)

    def suspect(self) -> None:
        """Make the facts due, because a leg has failed at the engine."""
        self._facts_due = min(self._facts_due, self._facts_at + SUSPECT_EVERY)

    def contradicted(self, why: str) -> None:
        """Put the engine in doubt, as it answered a request that its facts allow as another engine would.

        Requests that were sent before the facts were read last may still be answered, so then the facts are only due.
        """
        if self._clock() - self._facts_at >= SUSPECT_EVERY:
            self._doubt(why, FailureKind.CHANGED)
        else:
            self.suspect()

    def _doubt(self, why: str, kind: FailureKind) -> None:
        """Let the engine get no request, while there are others, until its facts were read again."""
        self._is_in_doubt = self._has_news = True
        self._facts_due = _NOW
        self._listener.failed(self._endpoint, EngineFailure(kind, why, is_doubt=True), self._clock())

    async def watch(self) -> None:
        """Read the readiness of an engine that is ready, between two rounds."""
        if self._facts is not None and (failure := await self._read_readiness(self._facts)) is not None:
            self._not_ready = failure
            self._listener.failed(self._endpoint, replace(failure, page_was_read=True), self._clock())

    async def round(self) -> EngineFailure | None:
        """Read the engine once. Returns the failure of the round, if there is one; the listener got it, too."""
        self._round_at = self._clock()
        failure = await self._round()
        if failure is not None:
            self._listener.failed(self._endpoint, failure, self._clock())
        return failure

    async def _round(self) -> EngineFailure | None:
        if self._is_in_doubt or self._clock() >= self._facts_due:
            self._facts_failure = await self._discover()
        failure = self._facts_failure
        if self._facts is not None and (failure is None or failure.kind not in GONE):
            failure = await self._read(self._facts)
            if failure is not None and failure.is_away:
                self._facts_due = self._ready_due = _NOW
        else:
            self._facts_due = _NOW
        self._is_starting = self._is_starting or (failure is not None and failure.kind in GONE)
        return failure

    async def _read(self, facts: EngineFacts) -> EngineFailure | None:
        """Read whether the engine is ready, and its load. An engine that was never ready has its facts alone read."""
        if self._clock() >= self._ready_due:
            self._not_ready = await self._read_readiness(facts)
        if self._not_ready is not None and self._is_joining:
            return self._not_ready
        started = self._clock()
        page = await self._load_page(facts, started)
        why = self._contradicts(page, facts)
        if why is not None and why != self._contradiction:
            self._contradiction = why
            is_read = self._facts_at >= self._round_at
            if self._facts_failure is not None or not is_read:
                self._doubt(why, page.kind if isinstance(page, EngineFailure) else FailureKind.CHANGED)
            if not is_read:  # facts are read once a round, however often a page changes
                return await self._round()
        if why is None and isinstance(page, LoadPage):
            self._is_in_doubt, self._contradiction = False, None
        if self._not_ready is None and not self._is_in_doubt and self._has_news:
            self._is_joining = self._is_starting = self._has_news = False
            self._listener.discovered(self._endpoint, self._engine.address, facts, self._clock())
        failure = self._sampled(page, facts, started) if isinstance(page, LoadPage) else replace(page, is_doubt=False)
        # Facts that cannot be read do not keep the load from being read; they are read again when they are due.
        beside = self._not_ready or self._facts_failure
        return replace(beside, page_was_read=True) if failure is None and beside is not None else failure

    def _contradicts(self, page: LoadPage | EngineFailure, facts: EngineFacts) -> str | None:
        """Explain why a page, or the answer in its place, may be that of another engine; None if it need not be."""
        if isinstance(page, EngineFailure):
            return page.message if page.is_doubt else None
        counts, self._counts = self._counts, self._counts.after(page)
        return contradiction(facts, page) or counts.fell(self._counts)

    async def _read_readiness(self, facts: EngineFacts) -> EngineFailure | None:
        """Read whether the engine takes requests; None if it does.

        An engine without the page counts as ready, whatever it or a proxy answers in its place (404, or 401 or 403).
        """
        adapter = adapter_of(facts.kind)
        page = adapter.joining_page(facts) if self._is_joining and self._is_starting else adapter.ready_page
        self._ready_due, self._reports_readiness = _NOW, page == adapter.ready_page
        try:
            await self._engine.get(page)
        except ReaderError as error:
            if error.status is None:  # the load page shows what is wrong with an engine that was ready
                is_away = self._is_joining and page == adapter.ready_page
                return EngineFailure(error.kind, str(error)) if is_away else None
            if error.status >= _FAULTY:
                self._has_news = True  # it is discovered anew when it is ready
                message = f"{page} answered {error.status}: the engine starts, is paused or shuts down"
                return EngineFailure(FailureKind.NOT_READY, message)
            self._ready_due = self._clock() + FACTS_EVERY  # each such answer costs a connection
            self._reports_readiness = False
        else:
            self._ready_due = self._clock() + READY_EVERY
        return None

    async def _discover(self) -> EngineFailure | None:
        may_be_another = self._facts_due == _NOW  # it was away, or it was never read
        self._facts_at = self._clock()
        self._facts_due = self._facts_at + FACTS_EVERY
        failure = None
        try:
            await self._engine.resolve()
            facts = self._with_overrides(await read_facts(self._engine, self._endpoint))
        except ReaderError as error:
            failure = EngineFailure(error.kind, str(error))
            self._was_gone = self._was_gone or failure.kind in GONE
            assumed = assumed_facts(self._endpoint)
            if failure.kind in AWAY or assumed is None or not (self._facts is None or self._is_assumed):
                return failure
            facts = assumed
        self._is_assumed = failure is not None
        facts = as_single_rank(facts, self._endpoint)
        if may_be_another or facts != self._facts:
            self._load = LoadState(self._source)
        if may_be_another:
            self._is_joining, self._ready_due = True, _NOW
        if may_be_another or facts != self._facts:
            self._counts = NO_COUNTS
        self._facts = facts
        self._has_news = True
        self._is_in_doubt = False
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

    async def _load_page(self, facts: EngineFacts, started: float) -> LoadPage | EngineFailure:
        try:
            page = await adapter_of(facts.kind).load(self._engine, self._endpoint, facts, self._load, started)
        except ReaderError as error:
            self._was_gone = self._was_gone or error.kind in GONE
            return EngineFailure(error.kind, str(error), is_doubt=(error.status or 0) >= _FAULTY)
        return page_of_single_rank(page, facts)

    def _sampled(self, page: LoadPage, facts: EngineFacts, started: float) -> EngineFailure | None:
        self._listener.sampled(self._endpoint, without_unknown_ranks(page, facts), started, self._clock())
        differs = disagreement(self._endpoint, facts, page)
        return None if differs is None else replace(differs, page_was_read=True)
