"""What one engine supports: by its release, and by the way that it was started."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dp_extproc.engines.model import EngineFacts, Kind, Mode
from dp_extproc.engines.sglang.releases import VLLM_RANK_HEADER, Fields, Methods, Release, RoomCheck, release_of
from dp_extproc.request.path import Api

_VLLM_RANK_HEADER_ON: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
"""Paths on which vLLM reads the rank from a header; on others it picks the rank itself."""
_VLLM_APIS: Final = frozenset(Api) - {Api.GENERATE}

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
    if facts.kind is Kind.VLLM:
        return _vllm(facts)
    release = release_of(facts.version)
    # An aggregated server needs no fields; a path that it does not have it refuses itself.
    apis = frozenset(Api) if facts.mode is Mode.UNIFIED else release.paths
    return Capabilities(
        carries_routed_rank=release.fields is not Fields.NONE,
        carries_prefill_rank=release.fields is Fields.BOTH,
        decode_control=_decode_control(facts, release),
        only_first_prefill_rank=_serves_only_first_rank(facts, release),
        apis=apis,
        rank_keys=_rank_keys(release) if facts.listener is None else {},
        overrides_on=(apis & release.overrides) if facts.reads_overrides else frozenset(),
    )


def _serves_only_first_rank(facts: EngineFacts, release: Release) -> bool:
    if facts.mode is not Mode.PREFILL or facts.dp_attention or facts.listener is not None:
        return False
    if facts.follows_rooms:
        return release.room_check is RoomCheck.REFUSES
    return release.fields is Fields.ROUTED


def _vllm(facts: EngineFacts) -> Capabilities:
    reads = (facts.version is None or facts.version >= VLLM_RANK_HEADER) and facts.dp_ranks > 1
    return Capabilities(
        carries_routed_rank=False,
        carries_prefill_rank=False,
        decode_control=RankControl.ENGINE,
        only_first_prefill_rank=False,
        apis=_VLLM_APIS,
        rank_keys={},
        rank_header_on=_VLLM_RANK_HEADER_ON if reads else frozenset(),
    )


def _decode_control(facts: EngineFacts, release: Release) -> RankControl:
    if release.fields is not Fields.NONE:
        return RankControl.BY_FIELD
    # data_parallel_rank is no way: a decode server before 0.5.10 takes its own rank for the prefill server's, too.
    if release.methods is Methods.NOBODY or facts.follows_rooms:
        return RankControl.BY_ROOM
    return RankControl.ENGINE


def _rank_keys(release: Release) -> dict[Api, str]:
    if release.fields is not Fields.NONE:
        return dict.fromkeys(release.paths, _ROUTED_DP_RANK)
    return dict.fromkeys(release.alias, _DATA_PARALLEL_RANK)
