"""The table of SGLang releases: what each range of them supports.

:mod:`dp_extproc.engines.sglang.capabilities` derives what one engine supports from this table and from its launch
arguments; :mod:`dp_extproc.engines.sglang.diagnostics` derives its known problems.
"""

from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.model import Version
from dp_extproc.request.path import Api


class Methods(Enum):
    """Which engines of a disaggregated pool obey ``--load-balance-method``."""

    NONE = auto()
    """The rank follows from the room, on prefill and on decode."""
    DECODE = auto()
    """Prefill follows rooms with any method (``server_args.py``)."""
    ALL = auto()


class Fields(Enum):
    """Which routing fields for ranks are obeyed."""

    NONE = auto()
    ROUTED = auto()
    """``routed_dp_rank`` is obeyed, and a rank out of range is refused. ``disagg_prefill_dp_rank`` exists, but the
    first request with it fails for each pair of engines (fixed by sgl-project/sglang#22990)."""
    BOTH = auto()
    """``routed_dp_rank`` and ``disagg_prefill_dp_rank`` are obeyed."""


class RoomCheck(Enum):
    """How a prefill engine that follows rooms treats a request whose room leads to another rank than its own."""

    NONE = auto()
    REFUSES = auto()
    SKIPPED = auto()
    """It serves the request if the prefill leg has ``disagg_prefill_dp_rank`` (sgl-project/sglang#27546). Nor does it
    register the rank of each request then."""


_NOWHERE: Final = frozenset[Api]()
_GENERATE: Final = frozenset({Api.GENERATE})
_OPENAI: Final = frozenset({Api.COMPLETIONS, Api.CHAT})
_EARLY: Final = _GENERATE | _OPENAI
_LATER: Final = _EARLY | {Api.RESPONSES}
_ALL: Final = frozenset(Api)

HEADER_APIS: Final = frozenset({Api.GENERATE, Api.CHAT, Api.MESSAGES})
"""Paths on which some release obeys ``x-override-*`` headers; ``/v1/messages`` is converted to chat."""


@dataclass(frozen=True, slots=True)
class Release:
    """A range of releases, up to the one before the next row."""

    since: Version
    load: LoadSource
    """The better page of load of the two that it may have."""
    methods: Methods
    fields: Fields
    room_check: RoomCheck
    paths: frozenset[Api]
    """Paths with the fields of disaggregation, and with ``routed_dp_rank`` where that exists."""
    alias: frozenset[Api]
    """Paths with ``data_parallel_rank``, in releases that have no better field. From 0.5.10 on it is deprecated, and
    missing on ``/generate`` of 0.5.15 to 0.5.17."""
    overrides: frozenset[Api]
    """Paths on which ``x-override-*`` headers are obeyed, in engines where that is switched on."""
    ends_closed: bool = True
    """Whether a stream that is closed ends its request. 0.5.18 and 0.5.19 drop the state of the request instead
    (``generate_request`` and ``_discard_pending_req_states`` of ``tokenizer_manager.py``; fixed by
    sgl-project/sglang#35255): it runs to its end, and ``/abort_request`` reaches it before the close alone."""


_METRICS, _LOADS = LoadSource.METRICS, LoadSource.LOADS


def _v(text: str) -> Version:
    return Version(*map(int, text.split(".")))


# since, load page, methods obeyed by, fields for ranks, room check, paths, paths of the alias, paths of overrides
TABLE: Final = (
    Release(_v("0.0.0"),  _METRICS, Methods.NONE,   Fields.NONE,   RoomCheck.NONE,    _NOWHERE, _NOWHERE,  _NOWHERE),
    Release(_v("0.4.6"),  _METRICS, Methods.NONE,   Fields.NONE,   RoomCheck.NONE,    _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.4.7"),  _METRICS, Methods.NONE,   Fields.NONE,   RoomCheck.NONE,    _EARLY,   _GENERATE, _NOWHERE),
    Release(_v("0.5.7"),  _METRICS, Methods.NONE,   Fields.NONE,   RoomCheck.NONE,    _EARLY,   _EARLY,    _NOWHERE),
    Release(_v("0.5.8"),  _LOADS,   Methods.DECODE, Fields.NONE,   RoomCheck.NONE,    _EARLY,   _EARLY,    _NOWHERE),
    Release(_v("0.5.10"), _LOADS,   Methods.ALL,    Fields.ROUTED, RoomCheck.NONE,    _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.5.11"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.REFUSES, _EARLY,   _NOWHERE,  _NOWHERE),
    Release(_v("0.5.15"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.REFUSES, _EARLY,   _NOWHERE,  _GENERATE),
    Release(_v("0.5.16"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _EARLY,   _NOWHERE,  _GENERATE),
    Release(_v("0.5.18"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _EARLY,   _NOWHERE,  HEADER_APIS,
            ends_closed=False),
    Release(_v("0.5.20"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _LATER,   _NOWHERE,  HEADER_APIS),
    Release(_v("0.5.22"), _LOADS,   Methods.ALL,    Fields.BOTH,   RoomCheck.SKIPPED, _ALL,     _NOWHERE,  HEADER_APIS),
)  # fmt: skip
"""All ranges, in order. The new meaning of ``dp_size`` in 0.5.22 needs no row: ``/server_info`` has both factors."""

DISAGGREGATION: Final = next(row.since for row in TABLE if row.paths)
"""First release with the bootstrap fields on HTTP requests."""
NEWEST: Final = TABLE[-1].since
"""The release that an engine of unknown version is taken for."""


def release_of(version: Version | None) -> Release:
    """Return the row of a release. A version of None is a private build, which is rather new than old."""
    if version is None:
        return TABLE[-1]
    return next((row for row, after in pairwise(TABLE) if version < after.since), TABLE[-1])
