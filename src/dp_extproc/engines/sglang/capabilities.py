"""What an SGLang engine supports, derived from the table of releases and from its launch arguments."""

from typing import Final

from dp_extproc.engines.capabilities import Capabilities, RankControl
from dp_extproc.engines.model import EngineFacts, Mode, Version
from dp_extproc.engines.sglang.releases import Fields, Methods, Release, RoomCheck, release_of
from dp_extproc.request.path import Api

_ROUTED_DP_RANK: Final = "routed_dp_rank"
_DATA_PARALLEL_RANK: Final = "data_parallel_rank"
_STALLS_PUBLISHED: Final = Version(0, 5, 19)
"""First release whose scheduler publishes its load every 50 ms while requests wait and no step runs (``on_idle``)."""
_PREFILL_TIMED: Final = Version(0, 5, 18)
"""First release whose ``total_prefill_busy_us`` counts time once. 0.5.17 adds up the spans from the start of a step to
the processing of its results (``_record_step_counters``), and with overlapping steps two of them run at a time."""


def capabilities(facts: EngineFacts) -> Capabilities:
    """Look up what an SGLang engine supports."""
    release = release_of(facts.version)
    # An aggregated pool needs no fields on any path; the engine itself refuses a path that it does not have.
    apis = frozenset(Api) if facts.mode is Mode.UNIFIED else release.paths
    return Capabilities(
        takes_routed_rank=release.fields is not Fields.NONE,
        takes_prefill_rank=release.fields is Fields.BOTH,
        decode_control=_decode_control(facts, release),
        only_first_prefill_rank=_serves_only_first_rank(facts, release),
        apis=apis,
        rank_keys=_rank_keys(release) if facts.single_rank is None else {},
        ends_closed=release.ends_closed,
        publishes_stalls=facts.version is None or facts.version >= _STALLS_PUBLISHED,
        times_prefill=facts.version is None or facts.version >= _PREFILL_TIMED,
        overrides_on=(apis & release.overrides) if facts.reads_overrides else frozenset(),
    )


def _serves_only_first_rank(facts: EngineFacts, release: Release) -> bool:
    """Return whether a prefill engine fails the requests of every rank but the first.

    That is a problem of plain DP (``--dp-size`` without DP attention), where every replica takes itself for attention
    rank 0 (sgl-project/sglang#29725). From 0.5.11 to 0.5.15 an engine that follows rooms compares the room with that
    rank, and fails the requests of all other replicas; later releases skip the comparison for requests of this service.
    In 0.5.10 an engine that does not follow rooms reports rank 0 to decode, and requests cannot name the right one.
    """
    if facts.mode is not Mode.PREFILL or facts.dp_attention or facts.single_rank is not None:
        return False
    if facts.follows_rooms:
        return release.room_check is RoomCheck.REFUSES
    return release.fields is Fields.ROUTED


def _decode_control(facts: EngineFacts, release: Release) -> RankControl:
    if release.fields is not Fields.NONE:
        return RankControl.BY_FIELD
    # data_parallel_rank is not used: before 0.5.10 decode takes its own rank for the rank of prefill, too.
    if release.methods is Methods.NONE or facts.follows_rooms:
        return RankControl.BY_ROOM
    return RankControl.ENGINE


def _rank_keys(release: Release) -> dict[Api, str]:
    if release.fields is not Fields.NONE:
        return dict.fromkeys(release.paths, _ROUTED_DP_RANK)
    return dict.fromkeys(release.alias, _DATA_PARALLEL_RANK)
