"""What one engine supports: by its release, and by the way that it was started. Pure data; adapters fill it in."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dp_extproc.request.path import Api


class RankControl(Enum):
    """Who decides the rank of a disaggregated server."""

    BY_FIELD = "routed_dp_rank in the body"
    BY_ROOM = "bootstrap_room mod ranks"
    ENGINE = "the engine itself"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one engine takes."""

    takes_routed_rank: bool
    """Whether ``routed_dp_rank`` is obeyed."""
    takes_prefill_rank: bool
    """Whether ``disagg_prefill_dp_rank`` may be sent."""
    decode_control: RankControl
    """How a decode server's rank is decided."""
    only_first_prefill_rank: bool
    """Whether a prefill engine fails the requests of every rank but the first."""
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
