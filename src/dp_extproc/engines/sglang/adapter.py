"""The adapter of SGLang engines: how one is read, and how it differs from other kinds."""

from dataclasses import replace
from http import HTTPStatus
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.contract import OVERRIDE_RANK
from dp_extproc.engines.capabilities import Capabilities
from dp_extproc.engines.model import MODE_OF, Diagnostic, Endpoint, EngineFacts, LoadPage, LoadState, Role, Version
from dp_extproc.engines.model_cards import listed_models
from dp_extproc.engines.pages import FACTS_PATIENCE, METRICS_PAGE, EngineHttp, ReaderError
from dp_extproc.engines.sglang.capabilities import capabilities
from dp_extproc.engines.sglang.diagnostics import diagnostics
from dp_extproc.engines.sglang.load_pages import LOADS_PAGE, read_loads, read_metrics
from dp_extproc.engines.sglang.releases import HEADER_APIS, release_of
from dp_extproc.engines.sglang.server_info import (
    DEFAULT_BOOTSTRAP_PORT,
    FACTS_PAGE,
    OLD_FACTS_PAGE,
    follows_rooms,
    read_server_info,
)
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

_PROMPT_TOKENS_EVERY: Final = 10.0
"""Seconds between two reads of the count of prompt tokens, which only ``/metrics`` has."""

_READY_PAGE: Final = Version(0, 5, 20)
"""First release with ``/ready``."""
_LOADS_HINT: Final = "it exists from SGLang 0.5.8 on; set load.source to auto or metrics"
_METRICS_HINT: Final = "start the engine with --enable-metrics"

_PROBE: Final = b'{"text":"probe","sampling_params":{"max_new_tokens":1},"routed_dp_rank":1000000}'
"""A request for a rank out of range."""


class SglangAdapter:
    """The adapter of SGLang engines; see :class:`dp_extproc.engines.adapter.EngineAdapter`."""

    facts_page = FACTS_PAGE
    ready_page = "/ready"  # from 0.5.20 on; /health of all releases computes a token
    header_apis = HEADER_APIS

    def joining_page(self, facts: EngineFacts) -> str:
        """Return ``/health`` before 0.5.20: until the warm-up is over it answers 503, and computes no token."""
        has_ready_page = facts.version is None or facts.version >= _READY_PAGE
        return self.ready_page if has_ready_page else "/health"

    async def facts(self, http: EngineHttp, endpoint: Endpoint) -> EngineFacts:
        """Read ``/server_info`` and ``/v1/models``.

        If the pool needs ``x-override-*`` headers, also probe whether they are obeyed.
        """
        facts = read_server_info(await _facts_page(http))
        facts = replace(facts, cards=await listed_models(http, facts.kind))
        if not endpoint.needs_overrides:
            return facts
        could_obey = bool(release_of(facts.version).overrides)
        return replace(facts, reads_overrides=could_obey and await _obeys_overrides(http))

    def assumed_facts(self, endpoint: Endpoint, ranks: int) -> EngineFacts:
        """Return the facts of the newest release with default flags."""
        mode = MODE_OF[endpoint.role]
        port = endpoint.bootstrap_port or DEFAULT_BOOTSTRAP_PORT
        follows = follows_rooms(None, mode, None)
        return EngineFacts(version=None, dp_ranks=ranks, mode=mode, bootstrap_port=port, follows_rooms=follows)

    async def load(
        self, http: EngineHttp, endpoint: Endpoint, facts: EngineFacts, state: LoadState, now: float
    ) -> LoadPage:
        """Read the page that *state* names; with ``/v1/loads`` also, now and then, the count of prompt tokens."""
        page = await _load_page(http, state)
        if state.source is not LoadSource.LOADS or endpoint.role is Role.DECODE:
            return page
        if facts.metrics_enabled is False:
            # Too low by the cached tokens, but it grows in step with the true count.
            return replace(page, prompt_tokens=page.uncached_prompt_tokens)
        if now < state.prompt_tokens_due:
            return page
        state.prompt_tokens_due = now + _PROMPT_TOKENS_EVERY
        try:
            counts = await _metrics(http)
        except ReaderError:
            return page  # the counts only refine estimates
        return replace(page, prompt_tokens=counts.prompt_tokens, cached_prompt_tokens=counts.cached_prompt_tokens)

    def capabilities(self, facts: EngineFacts) -> Capabilities:
        return capabilities(facts)

    def diagnostics(self, facts: EngineFacts, endpoint: Endpoint) -> tuple[Diagnostic, ...]:
        return diagnostics(
            facts, endpoint.role, needs_overrides=endpoint.needs_overrides, headers_only=endpoint.headers_only
        )

    def role_conflict(self, facts: EngineFacts, role: Role) -> str | None:
        """Compare the engine's disaggregation mode with its role."""
        if (mode := MODE_OF[role]) is facts.mode:
            return None
        remedy = f"start it with --disaggregation-mode {mode}, or move it in the configuration"
        return f"its disaggregation_mode is {facts.mode}, but it is configured as {role}; {remedy}"

    def unavailable(self, api: Api, role: Role, versions: str) -> Rejection:
        message = f"{api.value} needs a newer SGLang than the {role} servers of this model run ({versions})"
        return Rejection(400, Reason.ENGINE_TOO_OLD, message)

    def release(self, facts: EngineFacts) -> str:
        return str(facts.version or "unknown")


async def _facts_page(http: EngineHttp) -> bytes:
    try:
        return await http.get(FACTS_PAGE, patience=FACTS_PATIENCE)
    except ReaderError as error:
        if not error.is_absent:
            raise
    return await http.get(OLD_FACTS_PAGE, patience=FACTS_PATIENCE)


async def _obeys_overrides(http: EngineHttp) -> bool | None:
    """Probe whether ``x-override-*`` headers are obeyed, which no page shows; None if the answer leaves it open.

    Both the header and the body of the probe are wrong, so it is refused for the one that is read first. From 0.5.10 on
    nothing of it reaches a scheduler.
    """
    answer = await http.post("/generate", _PROBE, (OVERRIDE_RANK, "probe"), patience=FACTS_PATIENCE)
    if answer is None:
        return None
    status, text = answer
    if status == HTTPStatus.OK:
        return False  # a header that is obeyed would have been refused
    if status != HTTPStatus.BAD_REQUEST:
        return None
    if OVERRIDE_RANK.encode() in text:
        return True
    return False if b"routed_dp_rank" in text else None


async def _load_page(http: EngineHttp, state: LoadState) -> LoadPage:
    source = state.source
    try:
        return await (_metrics(http) if source is LoadSource.METRICS else _loads(http))
    except ReaderError as error:
        if state.configured is not LoadSource.AUTO or not error.is_absent:
            raise
        state.source = LoadSource.LOADS
        if source is LoadSource.METRICS:
            raise  # the engine has changed; the next round tries the better page first
    page = await _metrics(http)
    state.source = LoadSource.METRICS
    return page


async def _loads(http: EngineHttp) -> LoadPage:
    return read_loads(await http.get(LOADS_PAGE, hint=_LOADS_HINT))


async def _metrics(http: EngineHttp) -> LoadPage:
    return read_metrics(await http.get(METRICS_PAGE, hint=_METRICS_HINT))
