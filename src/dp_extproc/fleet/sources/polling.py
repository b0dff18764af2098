"""One engine, round by round: who it is when that is not known, then its load."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.agreement import (
    configured_facts,
    disagreement,
    of_listener,
    page_of_listener,
    without_foreign_ranks,
)
from dp_extproc.engines.listener import AWAY, GONE, EngineFailure, EngineListener
from dp_extproc.engines.model import EngineFacts, Kind, LoadPage, Role
from dp_extproc.fleet.sources.http import EngineClient, ScrapeError

FACTS_EVERY: Final = 60.0
"""Seconds after which an engine is asked anew who it is, and its name looked up."""
UNTOLD_EVERY: Final = 5.0
"""Likewise, while it has not told whether it obeys ``x-override-*`` headers, which are needed."""
PROMPT_TOKENS_EVERY: Final = 10.0
"""Seconds between looks at the count of prompt tokens, which stands on /metrics only."""

_NOW: Final = -math.inf
"""A time that has come, whatever the clock says."""


class EngineWatch:
    """What is known of one engine. Each round tells the observer what it found."""

    def __init__(
        self, engine: EngineClient, source: LoadSource, observer: EngineListener, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._endpoint = engine.endpoint
        self._configured_source = source
        self._source = _preferred(source)
        self._observer = observer
        self._clock = clock
        self._facts: EngineFacts | None = None
        self._facts_failure: EngineFailure | None = None
        self._facts_due = _NOW
        self._prompt_tokens_due = _NOW
        self._was_gone = False

    @property
    def source(self) -> LoadSource:
        """Which page tells the load at present: ``LOADS`` or ``METRICS``."""
        return self._source

    @property
    def facts(self) -> EngineFacts | None:
        """What the engine says of itself; None as long as it has not."""
        return self._facts

    async def round(self) -> EngineFailure | None:
        """Ask the engine once. Returns what is wrong with it, if anything; the observer has been told."""
        if self._clock() >= self._facts_due:
            self._facts_failure = await self._discover()
        failure = self._facts_failure
        if self._facts is not None and (failure is None or failure.kind not in GONE):
            failure = await self._sample(self._facts)
            if failure is not None and failure.kind in AWAY:
                self._facts_due = _NOW
            if failure is None and self._facts_failure is not None:
                # A /server_info that fails on its own does not hinder; it is asked again when it is due.
                failure = replace(self._facts_failure, page_was_read=True)
        else:
            self._facts_due = _NOW
        if failure is not None:
            self._observer.failed(self._endpoint, failure, self._clock())
        return failure

    async def _discover(self) -> EngineFailure | None:
        was_away, self._facts_due = self._facts_due == _NOW, self._clock() + FACTS_EVERY
        failure = None
        try:
            await self._engine.resolve()
            facts = self._with_overrides(of_listener(await self._engine.facts(), self._endpoint))
        except ScrapeError as error:
            failure = error.failure
            self._was_gone = self._was_gone or failure.kind in GONE
            configured = configured_facts(self._endpoint)
            configured = None if configured is None else of_listener(configured, self._endpoint)
            if failure.kind in AWAY or self._facts is not None or configured is None:
                return failure
            facts = configured
        if was_away or facts != self._facts:
            self._source = _preferred(self._configured_source)
            self._prompt_tokens_due = _NOW
        self._facts = facts
        self._observer.discovered(self._endpoint, self._engine.address, facts, self._clock())
        return failure

    def _with_overrides(self, facts: EngineFacts) -> EngineFacts:
        """Hold on to what was known of ``x-override-*`` headers while an engine that was not gone does not tell."""
        if not self._endpoint.needs_overrides:
            return facts
        if facts.reads_overrides is not None:
            self._was_gone = False
        elif self._facts is not None and not self._was_gone:
            facts = replace(facts, reads_overrides=self._facts.reads_overrides)
        if facts.reads_overrides is None:
            self._facts_due = self._clock() + UNTOLD_EVERY
        return facts

    async def _sample(self, facts: EngineFacts) -> EngineFailure | None:
        started = self._clock()
        try:
            page = page_of_listener(await self._load_page(facts), facts)
            if self._source is LoadSource.LOADS:
                page = await self._with_prompt_tokens(page, facts)
        except ScrapeError as error:
            self._was_gone = self._was_gone or error.failure.kind in GONE
            return error.failure
        self._observer.sampled(self._endpoint, without_foreign_ranks(page, facts), started, self._clock())
        differs = disagreement(self._endpoint, facts, page)
        return None if differs is None else replace(differs, page_was_read=True)

    async def _load_page(self, facts: EngineFacts) -> LoadPage:
        if facts.kind is Kind.VLLM:
            self._source = LoadSource.METRICS
            return await self._engine.vllm_metrics()
        try:
            return await (self._engine.metrics() if self._source is LoadSource.METRICS else self._engine.loads())
        except ScrapeError as error:
            if self._configured_source is not LoadSource.AUTO or not error.is_absent:
                raise
            missing, self._source = self._source, LoadSource.LOADS
            if missing is LoadSource.METRICS:
                raise  # it has changed; the next round looks afresh
        page = await self._engine.metrics()
        self._source = LoadSource.METRICS
        return page

    async def _with_prompt_tokens(self, page: LoadPage, facts: EngineFacts) -> LoadPage:
        """Add the count of prompt tokens now and then; it only refines estimates, so an engine may do without.

        Without metrics the count of uncached ones stands in: too low by what the prefix cache holds, but in step.
        """
        if self._endpoint.role is Role.DECODE:
            return page
        if facts.metrics_enabled is False:
            return replace(page, prompt_tokens=page.uncached_prompt_tokens)
        if self._clock() < self._prompt_tokens_due:
            return page
        self._prompt_tokens_due = self._clock() + PROMPT_TOKENS_EVERY
        try:
            return replace(page, prompt_tokens=(await self._engine.metrics()).prompt_tokens)
        except ScrapeError:
            return page


def _preferred(source: LoadSource) -> LoadSource:
    return LoadSource.METRICS if source is LoadSource.METRICS else LoadSource.LOADS
