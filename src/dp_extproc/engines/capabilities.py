"""What one engine supports, by its release and its launch arguments. Adapters make this data. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from dp_extproc.request.path import Api


class RankControl(Enum):
    """What decides the rank of a request in an engine of a disaggregated pool."""

    BY_FIELD = "routed_dp_rank in the body"
    BY_ROOM = "bootstrap_room mod ranks"
    ENGINE = "the engine itself"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one engine supports."""

    apis: frozenset[Api]
    """Paths on which requests can have the routing fields that the engine needs."""
    decode_control: RankControl = RankControl.ENGINE
    """How the rank is decided in a decode engine."""
    takes_routed_rank: bool = False
    """Whether ``routed_dp_rank`` is obeyed."""
    takes_prefill_rank: bool = False
    """Whether ``disagg_prefill_dp_rank`` may be sent."""
    only_first_prefill_rank: bool = False
    """Whether a prefill engine fails the requests of every rank but the first."""
    overrides_on: frozenset[Api] = frozenset()
    """Paths on which ``x-override-*`` headers can stand for all routing fields, in a disaggregated pool."""
    rank_keys: dict[Api, str] = field(default_factory=dict)
    """The name of the rank in the body, by path, for an engine of an aggregated pool."""
    rank_header_on: frozenset[Api] = frozenset()
    """Paths on which an engine of an aggregated pool reads the rank from the header ``X-data-parallel-rank``."""

    ends_closed: bool = True
    """Whether a stream that is closed ends its request. Else only ``/abort_request`` does that, before the close."""
    publishes_stalls: bool = False
    """Whether the load is published anew, too, while requests wait and no step runs."""
    times_prefill: bool = False
    """Whether the counted time of prefill steps can be compared with that of other engines."""

    def serves(self, api: Api) -> bool:
        return api in self.apis

    def prefill_ranks(self, ranks: int) -> Sequence[int]:
        """Return the ranks, out of *ranks*, that a prefill engine can serve."""
        return range(1) if self.only_first_prefill_rank else range(ranks)

    def takes_rank(self, api: Api) -> bool:
        """Return whether an engine of an aggregated pool reads the rank of a request on a path."""
        return api in self.rank_keys or api in self.rank_header_on

    def aggregated_rank_key(self, api: Api) -> str | None:
        return self.rank_keys.get(api)
