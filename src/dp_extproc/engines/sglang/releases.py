"""The version matrix: what each range of SGLang releases takes, and who obeys it. Nothing else compares versions.

:mod:`dp_extproc.engines.capabilities` derives from it, and from the way that an engine was started, what that engine
supports; :mod:`dp_extproc.engines.sglang.diagnostics` derives its known problems.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.model import Version
from dp_extproc.request.path import Api


class Methods(Enum):
    """Which servers do as ``--load-balance-method`` says."""

    NOBODY = auto()
    """In disaggregated mode the room leads to the rank, on both sides."""
    DECODE = auto()
    """Prefill follows rooms whatever was asked for (server_args.py)."""
    ALL = auto()


class Fields(Enum):
    """Which fields for ranks are obeyed."""

    NONE = auto()
    ROUTED = auto()
    """``routed_dp_rank``, and a rank out of range is refused. There is ``disagg_prefill_dp_rank``, too, but the first
    request of each pair of servers that carries it fails (fixed by sgl-project/sglang#22990)."""
    BOTH = auto()
    """Likewise ``disagg_prefill_dp_rank``."""


class RoomCheck(Enum):
    """What a prefill server that follows rooms makes of a request whose room says another rank than its own."""

    NONE = auto()
    REFUSES = auto()
    SKIPPED = auto()
    """Nothing, if the prefill leg names ``disagg_prefill_dp_rank`` (sgl-project/sglang#27546). Then it does not
    register the rank of each request either."""


_NOWHERE: Final = frozenset[Api]()
_GENERATE: Final = frozenset({Api.GENERATE})
_OPENAI: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
_EARLY: Final = _GENERATE | _OPENAI
_LATER: Final = _EARLY | {Api.RESPONSES}
_ALL: Final = frozenset(Api)

HEADER_APIS: Final = frozenset({Api.GENERATE, Api.CHAT, Api.MESSAGES})
"""Paths on which any release obeys ``x-override-*`` headers; /v1/messages is converted to chat."""


@dataclass(frozen=True, slots=True)
class Release:
    """A range of releases: from one, to the one before the next row's."""

    since: Version
    load: LoadSource
    """The best page of load that it has."""
    methods: Methods
    fields: Fields
    room_check: RoomCheck
    paths: frozenset[Api]
    """That carry the fields of disaggregation, and ``routed_dp_rank`` where there is one."""
    alias: frozenset[Api]
    """That carry ``data_parallel_rank``, as long as there is nothing better. From 0.5.10 on it is deprecated, and
    missing on /generate of 0.5.15 to 0.5.17."""
    overrides: frozenset[Api]
    """On which ``x-override-*`` headers are obeyed, where that is switched on."""


_METRICS, _LOADS = LoadSource.METRICS, LoadSource.LOADS


def _v(text: str) -> Version:
    return Version(*map(int, text.split(".")))


# since, load page, who obeys methods, fields for ranks, room check, paths, paths of the alias, paths of overrides
TABLE: Final = (
    Release(_v("0.0.0"),  _METRICS, Methods.NOBODY, Fields.NONE,   RoomCheck.NONE,    _NOWHERE, _NOWHERE,  _NOWHERE),
    Release(_v("0.4.6"),  _METRICS, Methods.NOBODY, Fields.NONE,   RoomCheck.NONE,    _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.4.7"),  _METRICS, Methods.NOBODY, Fields.NONE,   RoomCheck.NONE,    _EARLY,   _GENERATE, _NOWHERE),
    Release(_v("0.5.7"),  _METRICS, Methods.NOBODY, Fields.NONE,   RoomCheck.NONE,    _EARLY,   _EARLY,    _NOWHERE),
    Release(_v("0.5.8"),  _LOADS,   Methods.DECODE, Fields.NONE,   RoomCheck.NONE,    _EARLY,   _EARLY,    _NOWHERE),
    Release(_v("0.5.10"), _LOADS,   Methods.ALL,    Fields.ROUTED, RoomCheck.NONE,    _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.5.11"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.REFUSES, _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.5.15"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.REFUSES, _EARLY,   _NOWHERE,  _GENERATE),
    Release(_v("0.5.16"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _EARLY,   _NOWHERE,  _GENERATE),
    Release(_v("0.5.18"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _EARLY,   _NOWHERE,  HEADER_APIS),
    Release(_v("0.5.20"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _LATER,   _NOWHERE,  HEADER_APIS),
    Release(_v("0.5.22"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _ALL,     _NOWHERE,  HEADER_APIS),
)  # fmt: skip
"""In order. What 0.5.22 changed in the meaning of ``dp_size`` needs no row: /server_info tells both factors."""

DISAGGREGATION: Final = next(row.since for row in TABLE if row.paths)
"""First with the bootstrap fields on HTTP requests."""
NEWEST: Final = TABLE[-1].since
"""For which an engine is taken whose version is not known."""
VLLM_RANK_HEADER: Final = Version(0, 11, 0)
"""First vLLM that reads ``X-data-parallel-rank`` (vllm-project/vllm#24945)."""


def release_of(version: Version | None) -> Release:
    """Find a release's row. A build whose version names no release is somebody's own, and rather new than old."""
    if version is None:
        return TABLE[-1]
    return next((row for row, after in pairwise(TABLE) if version < after.since), TABLE[-1])
