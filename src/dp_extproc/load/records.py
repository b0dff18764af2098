"""What was sent where, as replicas tell each other."""

from msgspec import Struct

from dp_extproc.engines.quantities import Amount, Count
from dp_extproc.load.request_cost import RequestCost


class PlacementRecord(Struct, frozen=True):
    """One attempt as it stands on the books. The bounds are checked where another replica tells of it."""

    pool: str
    demand: RequestCost
    decode: str
    """URL of the server that answers the client; of an aggregated pool's worker, too."""
    decode_rank: Count | None
    """None when the engine picks."""
    prefill: str | None = None
    """URL; None in aggregated pools."""
    prefill_rank: Count | None = None
    cached: Amount = 0.0
    """Prompt tokens that the rank which computes them was taken to hold already."""
