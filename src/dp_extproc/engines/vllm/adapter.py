"""The adapter of vLLM engines: how one is read, and how it differs from other kinds."""
# ruff: noqa: ARG002 - vLLM needs not all that the protocol hands in

from collections.abc import Iterator
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.capabilities import Capabilities
from dp_extproc.engines.model import Diagnostic, Endpoint, EngineFacts, Kind, LoadPage, LoadState, Mode, Role, Version
from dp_extproc.engines.model_cards import MODELS_PAGE, read_cards
from dp_extproc.engines.pages import FACTS_PATIENCE, METRICS_PAGE, EngineHttp
from dp_extproc.engines.vllm.pages import facts_of, read_version, read_vllm_metrics
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

_READS_RANK_HEADER: Final = Version(0, 11, 0)
"""First release that reads ``X-data-parallel-rank`` (vllm-project/vllm#24945)."""
_RANK_HEADER_ON: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
"""Paths on which vLLM reads the rank from a header; on others it picks the rank itself."""
_APIS: Final = frozenset(Api) - {Api.GENERATE}


class VllmAdapter:
    """The adapter of vLLM engines; see :class:`dp_extproc.engines.adapter.EngineAdapter`."""

    facts_page = METRICS_PAGE
    ready_page = "/health"
    header_apis = frozenset[Api]()

    def joining_page(self, facts: EngineFacts) -> str:
        return self.ready_page

    async def facts(self, http: EngineHttp, endpoint: Endpoint) -> EngineFacts:
        """Read ``/version``, ``/v1/models`` and ``/metrics``."""
        version = read_version(await http.get("/version", patience=FACTS_PATIENCE))
        cards = read_cards(await http.get(MODELS_PAGE, patience=FACTS_PATIENCE), Kind.VLLM)
        return facts_of(version, cards, await http.get(METRICS_PAGE, patience=FACTS_PATIENCE))

    def assumed_facts(self, endpoint: Endpoint, ranks: int) -> EngineFacts:
        """Return the facts of the newest release."""
        return EngineFacts(version=None, dp_ranks=ranks, mode=Mode.UNIFIED, kind=Kind.VLLM)

    async def load(
        self, http: EngineHttp, endpoint: Endpoint, facts: EngineFacts, state: LoadState, now: float
    ) -> LoadPage:
        """Read ``/metrics``, the only page that vLLM has."""
        state.source = LoadSource.METRICS
        return read_vllm_metrics(await http.get(METRICS_PAGE))

    def capabilities(self, facts: EngineFacts) -> Capabilities:
        return capabilities(facts)

    def diagnostics(self, facts: EngineFacts, endpoint: Endpoint) -> tuple[Diagnostic, ...]:
        return tuple(diagnostics(facts, endpoint.role))

    def role_conflict(self, facts: EngineFacts, role: Role) -> str | None:
        """Refuse every role of a disaggregated pool."""
        if role is Role.WORKER:
            return None
        return (
            f"it is a vLLM server, which cannot be the {role} side: its KV connectors run prefill before "
            "decode, and both legs are sent at once; list it under workers"
        )

    def unavailable(self, api: Api, role: Role, versions: str) -> Rejection:
        message = f"{api.value} is not a path of the servers of this model ({versions})"
        return Rejection(400, Reason.CANNOT_CARRY_ROUTING, message)

    def release(self, facts: EngineFacts) -> str:
        return f"{facts.kind}-{facts.version or 'unknown'}"


def capabilities(facts: EngineFacts) -> Capabilities:
    """Look up what a vLLM engine supports."""
    reads = (facts.version is None or facts.version >= _READS_RANK_HEADER) and facts.dp_ranks > 1
    return Capabilities(_APIS, rank_header_on=_RANK_HEADER_ON if reads else frozenset())


def diagnostics(facts: EngineFacts, role: Role) -> Iterator[Diagnostic]:
    """List the known problems of a vLLM engine in a role, the worst first."""
    if role is not Role.WORKER:
        yield Diagnostic(
            "vllm_disaggregated",
            "vLLM's KV connectors run prefill before decode, and decode needs what prefill answered: both legs cannot "
            "be sent at once",
            "list it under workers; keep vLLM's own proxy for disaggregated vLLM",
            unusable=True,
        )
    if facts.version is None:
        yield Diagnostic(
            "unknown_version", "its version names no release; it is treated like the newest vLLM", "use a release"
        )
    elif facts.version < _READS_RANK_HEADER and facts.dp_ranks > 1:
        yield Diagnostic(
            "rank_not_carried",
            "its release reads no rank from requests: vLLM itself picks it",
            f"upgrade to vLLM {_READS_RANK_HEADER}, or give each rank a port of its own (--data-parallel-external-lb)",
        )
