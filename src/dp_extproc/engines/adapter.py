"""The kinds of engines: one adapter for each, and the choice among them for an endpoint.

No module outside of this package compares kinds. Everything that differs between kinds, texts for operators included,
is a member of :class:`EngineAdapter`.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from dp_extproc.config.pools import EngineKind
from dp_extproc.engines.capabilities import Capabilities
from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import Diagnostic, Endpoint, EngineFacts, Kind, LoadPage, LoadState, Role
from dp_extproc.engines.pages import EngineHttp, ReaderError
from dp_extproc.engines.sglang.adapter import SglangAdapter
from dp_extproc.engines.vllm.adapter import VllmAdapter
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection


class EngineAdapter(Protocol):
    """What differs between kinds of engines. An adapter has no state, and reads pages over the HTTP handed in."""

    @property
    def facts_page(self) -> str:
        """The page that shows the number of DP ranks, for messages."""

    @property
    def ready_page(self) -> str:
        """The page that answers 200 while the engine takes requests. An engine without it counts as ready."""

    def joining_page(self, facts: EngineFacts) -> str:
        """Return the page that answers 200 when an engine has started. It may compute a token, so it is read once."""

    @property
    def header_apis(self) -> frozenset[Api]:
        """The paths on which some release reads all routing fields from headers."""

    async def facts(self, http: EngineHttp, endpoint: Endpoint) -> EngineFacts:
        """Read what an engine is, or raise ``ReaderError``."""

    def assumed_facts(self, endpoint: Endpoint, ranks: int) -> EngineFacts:
        """Return facts for an engine that does not report them, with the configured number of DP ranks."""

    async def load(
        self, http: EngineHttp, endpoint: Endpoint, facts: EngineFacts, state: LoadState, now: float
    ) -> LoadPage:
        """Read the load of an engine, or raise ``ReaderError``. The *state* of the rounds before is updated.

        *now* is in monotonic seconds.
        """

    def capabilities(self, facts: EngineFacts) -> Capabilities:
        """Look up what an engine supports."""

    def diagnostics(self, facts: EngineFacts, endpoint: Endpoint) -> tuple[Diagnostic, ...]:
        """List the known problems of an engine as it is configured, the worst first."""

    def role_conflict(self, facts: EngineFacts, role: Role) -> str | None:
        """Explain why an engine cannot have a role, and what to do; None if it can."""

    def unavailable(self, api: Api, role: Role, versions: str) -> Rejection:
        """Refuse a request on a path that no engine of a role can serve. The message names their *versions*."""

    def release(self, facts: EngineFacts) -> str:
        """Name the release of an engine in a table."""


_ADAPTERS: Final[Mapping[Kind, EngineAdapter]] = {Kind.SGLANG: SglangAdapter(), Kind.VLLM: VllmAdapter()}
_KINDS: Final = {EngineKind.AUTO: tuple(_ADAPTERS), EngineKind.SGLANG: (Kind.SGLANG,), EngineKind.VLLM: (Kind.VLLM,)}
"""The kinds that an engine may be of, by its configuration, in the order of the attempts to read it."""


def adapter_of(kind: Kind) -> EngineAdapter:
    return _ADAPTERS[kind]


async def read_facts(http: EngineHttp, endpoint: Endpoint) -> EngineFacts:
    """Read the facts of an engine, by the first adapter that finds its pages where the kind is not configured.

    If no adapter can read them, ``ReaderError`` is that of the first kind, unless the engine has pages of another one.
    """
    reasons: list[ReaderError] = []
    for kind in _KINDS[endpoint.engine]:
        try:
            return await adapter_of(kind).facts(http, endpoint)
        except ReaderError as error:
            reasons.append(error)
            if not (error.is_absent or error.kind is FailureKind.WRONG_SHAPE):
                break  # the engine may well be of this kind
    raise next((each for each in reversed(reasons) if not each.is_absent), reasons[0])


def assumed_facts(endpoint: Endpoint) -> EngineFacts | None:
    """Return facts for an engine that does not report them; None without a configured number of DP ranks."""
    ranks = endpoint.dp_size
    return None if ranks is None else adapter_of(_KINDS[endpoint.engine][0]).assumed_facts(endpoint, ranks)


def unavailable(api: Api, role: Role, engines: Iterable[EngineFacts]) -> Rejection:
    """Refuse a request on a path that none of these engines can serve.

    For engines of several kinds the message is that of the first kind, whose newer releases serve all paths.
    """
    releases = {(each.kind, each.version) for each in engines}
    versions = ", ".join(sorted(f"{kind} {version or 'of unknown version'}" for kind, version in releases))
    kinds = {kind for kind, _ in releases}
    return next(_ADAPTERS[kind] for kind in _ADAPTERS if kind in kinds).unavailable(api, role, versions)
