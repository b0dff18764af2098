"""What each SGLang release takes: the version matrix, as one table.

A release differs from the one before in what its requests may carry and in who obeys it. Nothing else in the
service compares versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dp_extproc.fleet.endpoint import EngineFacts, Kind, Mode, Role, Version
from dp_extproc.fleet.server_info import METHODS_SINCE
from dp_extproc.request.path import Api

DISAGGREGATION: Final = Version(0, 4, 6)
"""First with the bootstrap fields on HTTP requests."""
ALIAS_ON_GENERATE: Final = Version(0, 4, 7)
"""First with ``data_parallel_rank`` on /generate."""
ALIAS_ON_OPENAI: Final = Version(0, 5, 7)
"""First with ``data_parallel_rank`` on the OpenAI paths."""
ROUTED_RANK: Final = Version(0, 5, 10)
"""First with ``routed_dp_rank`` (and ``data_parallel_rank`` deprecated, missing on /generate in 0.5.15-0.5.17)."""
PREFILL_RANK: Final = Version(0, 5, 11)
"""First where ``disagg_prefill_dp_rank`` can be used. 0.5.10 has it, but fails the first request of each pair of
servers that carries it (fixed by sgl-project/sglang#22990)."""
ROOM_CHECK: Final = Version(0, 5, 11)
"""First where a prefill server that follows rooms refuses a request whose room says another rank."""
ROOM_CHECK_SKIPPED: Final = Version(0, 5, 16)
"""First where ``disagg_prefill_dp_rank`` on the prefill leg skips that check and the registration of the rank
(sgl-project/sglang#27546)."""
ON_RESPONSES: Final = Version(0, 5, 20)
"""First with routing fields on /v1/responses."""
ON_MESSAGES: Final = Version(0, 5, 22)
"""First with routing fields on /v1/messages."""

OVERRIDES_ON_GENERATE: Final = Version(0, 5, 15)
"""First that reads ``x-override-*`` on /generate, where that is switched on."""
OVERRIDES_ON_CHAT: Final = Version(0, 5, 18)
"""First that reads them on /v1/chat/completions, and /v1/messages, which is converted to it."""
HEADER_APIS: Final = frozenset({Api.GENERATE, Api.CHAT, Api.MESSAGES})
"""The paths on which any release reads them."""
VLLM_RANK_HEADER: Final = Version(0, 11, 0)
"""First vLLM that reads ``X-data-parallel-rank`` (vllm-project/vllm#24945) ..."""
_VLLM_RANK_HEADER_ON: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
"""... on these paths; on others it picks the rank itself."""
_VLLM_APIS: Final = frozenset(Api) - {Api.GENERATE}

_NEWEST: Final = Version(999_999, 0, 0)
"""Stands for an engine that does not tell its version: a build of somebody's own is rather new than old."""

_OPENAI: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
_TABLE: Final[tuple[tuple[Version, frozenset[Api]], ...]] = (
    (DISAGGREGATION, frozenset({Api.GENERATE, *_OPENAI})),
    (ON_RESPONSES, frozenset({Api.RESPONSES})),
    (ON_MESSAGES, frozenset({Api.MESSAGES})),
)
"""Which paths carry the disaggregation fields, from which release on."""

RANK_HEADER: Final = "x-data-parallel-rank"
_ROUTED_DP_RANK: Final = "routed_dp_rank"
_DATA_PARALLEL_RANK: Final = "data_parallel_rank"


class RankControl(Enum):
    """Who decides the rank of a disaggregated server."""

    BY_FIELD = "routed_dp_rank in the body"
    BY_ROOM = "bootstrap_room mod ranks"
    ENGINE = "the engine itself"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one engine takes."""

    carries_routed_rank: bool
    """Whether ``routed_dp_rank`` is obeyed."""
    carries_prefill_rank: bool
    """Whether ``disagg_prefill_dp_rank`` may be sent."""
    decode_control: RankControl
    """How a decode server's rank is decided."""
    only_first_prefill_rank: bool
    """Whether every other rank of this prefill server fails its requests; see :func:`capabilities`."""
    apis: frozenset[Api]
    """Paths on which a request to it can carry what it needs."""
    rank_keys: dict[Api, str]
    """What an aggregated server calls the rank in the body, by path."""
    rank_header_on: frozenset[Api] = frozenset()
    """Paths on which an aggregated server reads the rank from the header ``X-data-parallel-rank``."""

    def serves(self, api: Api) -> bool:
        return api in self.apis

    def prefill_ranks(self, ranks: int) -> Sequence[int]:
        """Give the ranks, out of *ranks*, that a prefill server can serve."""
        return range(1) if self.only_first_prefill_rank else range(ranks)

    def describe(self, role: Role, facts: EngineFacts, *, headers_only: bool = False) -> str:
        """Say in a line how requests reach the ranks of an engine."""
        if headers_only:
            paths = ", ".join(sorted(self.overrides_on)) or "none"
            return f"rank, room and prefill's rank by x-override-* headers alone; paths: {paths}"
        if facts.listener is not None:
            ways = f"rank {facts.listener[0]} of {facts.listener[1]} by its address"
        elif facts.dp_ranks == 1:
            ways = "one rank"
        elif role is Role.WORKER:
            keys = {key: [api for api in Api if self.rank_keys.get(api) == key] for key in self.rank_keys.values()}
            told = [f"{key} ({', '.join(apis)})" for key, apis in keys.items()]
            if self.rank_header_on:
                told.append(f"the header {RANK_HEADER} ({', '.join(sorted(self.rank_header_on))})")
            ways = f"rank by {'; '.join(told)}" if told else "rank by the engine itself"
        else:
            control = RankControl.BY_FIELD if self.carries_routed_rank else RankControl.BY_ROOM
            ways = f"rank by {(control if role is Role.PREFILL else self.decode_control).value}"
            if self.only_first_prefill_rank:
                ways = "rank 0 only"
            elif role is Role.PREFILL and self.carries_routed_rank:
                ways += ", and a room that agrees"
        if role is Role.WORKER:
            return ways
        if self.overrides_on:
            ways += f"; by x-override-* headers where nothing is streamed ({', '.join(sorted(self.overrides_on))})"
        prefill = "; prefill's rank by disagg_prefill_dp_rank" if self.carries_prefill_rank else ""
        return f"{ways}{prefill}; paths: {', '.join(api for api in Api if self.serves(api)) or 'none'}"

    overrides_on: frozenset[Api] = frozenset()
    """Paths on which a disaggregated server can be told everything by ``x-override-*`` headers."""

    def takes_rank(self, api: Api) -> bool:
        """Tell whether an aggregated server can be told the rank on a path."""
        return api in self.rank_keys or api in self.rank_header_on

    def aggregated_rank_key(self, api: Api) -> str | None:
        return self.rank_keys.get(api)


def capabilities(facts: EngineFacts) -> Capabilities:
    """Look up what an engine takes.

    A plain-DP prefill server (``--dp-size`` without DP attention) takes itself for attention rank 0 in every replica
    (sgl-project/sglang#29725). From 0.5.11 to 0.5.15 one that follows rooms compares the room with that, and refuses
    whatever the other replicas get; later releases skip the comparison on our requests. In 0.5.10 one that does not
    follow rooms tells decode that rank, where requests cannot name the true one.
    """
    version = facts.version or _NEWEST
    if facts.kind is Kind.VLLM:
        return _vllm(facts, version)
    if facts.mode is Mode.UNIFIED:
        apis = frozenset(Api)  # it needs no fields; a path that it does not have it refuses itself
    else:
        apis = frozenset[Api]().union(*(added for since, added in _TABLE if version >= since))
    return Capabilities(
        carries_routed_rank=version >= ROUTED_RANK,
        carries_prefill_rank=version >= PREFILL_RANK,
        decode_control=_decode_control(facts, version),
        only_first_prefill_rank=(
            facts.mode is Mode.PREFILL
            and not facts.dp_attention
            and facts.listener is None
            and (
                ROOM_CHECK <= version < ROOM_CHECK_SKIPPED
                if facts.follows_rooms
                else ROUTED_RANK <= version < PREFILL_RANK
            )
        ),
        apis=apis,
        rank_keys=_rank_keys(version) if facts.listener is None else {},
        overrides_on=(apis & _overrides_on(version)) if facts.reads_overrides else frozenset(),
    )


def _overrides_on(version: Version) -> frozenset[Api]:
    if version >= OVERRIDES_ON_CHAT:
        return HEADER_APIS
    return frozenset({Api.GENERATE}) if version >= OVERRIDES_ON_GENERATE else frozenset()


def _vllm(facts: EngineFacts, version: Version) -> Capabilities:
    reads = version >= VLLM_RANK_HEADER and facts.dp_ranks > 1
    return Capabilities(
        carries_routed_rank=False,
        carries_prefill_rank=False,
        decode_control=RankControl.ENGINE,
        only_first_prefill_rank=False,
        apis=_VLLM_APIS,
        rank_keys={},
        rank_header_on=_VLLM_RANK_HEADER_ON if reads else frozenset(),
    )


def _decode_control(facts: EngineFacts, version: Version) -> RankControl:
    if version >= ROUTED_RANK:
        return RankControl.BY_FIELD
    # data_parallel_rank is no way: a decode server before 0.5.10 takes its own rank for the prefill server's, too.
    if version < METHODS_SINCE or facts.follows_rooms:
        return RankControl.BY_ROOM
    return RankControl.ENGINE


def _rank_keys(version: Version) -> dict[Api, str]:
    keys: dict[Api, str] = {}
    if version >= ROUTED_RANK:
        keys = dict.fromkeys((Api.GENERATE, *_OPENAI), _ROUTED_DP_RANK)
    elif version >= ALIAS_ON_GENERATE:
        keys = {Api.GENERATE: _DATA_PARALLEL_RANK}
        if version >= ALIAS_ON_OPENAI:
            keys |= dict.fromkeys(_OPENAI, _DATA_PARALLEL_RANK)
    if version >= ON_RESPONSES:
        keys[Api.RESPONSES] = _ROUTED_DP_RANK
    if version >= ON_MESSAGES:
        keys[Api.MESSAGES] = _ROUTED_DP_RANK
    return keys
