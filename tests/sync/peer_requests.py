"""Record the calls that reservations of peers get, for assertions."""

from dataclasses import dataclass, field

from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.prefix_cache.blocks import Prefix

RECORD = PlacementRecord(
    pool="llama",
    cost=RequestCost(tokens=1200.0, requests=2.0, prefix=Prefix((1, (1 << 64) - 1), (1024, 2000)), session="a session"),
    decode="http://10.0.0.2:30000",
    decode_rank=None,
    prefill="http://10.0.0.1:30000",
    prefill_rank=3,
    cached=200.0,
)


def record_to(rank: int) -> PlacementRecord:
    """Make a placement record that its rank identifies."""
    return PlacementRecord("llama", RequestCost(100.0), "http://10.0.0.2:30000", rank, "http://10.0.0.1:30000", rank)


@dataclass(eq=False)
class RecordedRequest:
    """Record the events of a peer's attempt, and refuse calls that no real reservations would get."""

    record: PlacementRecord
    opened_at: float
    answered_at: float | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None

    def prefill_answered(self, status: int, now: float) -> None:
        assert status == 200
        self._still_open(now)
        if self.answered_at is None:
            self.answered_at = now

    def first_byte(self, status: int, now: float) -> None:
        assert status == 200
        self._still_open(now)
        if self.first_byte_at is None:
            self.first_byte_at = now

    def end(self, now: float) -> None:
        self._still_open(now)
        self.ended_at = now

    def _still_open(self, now: float) -> None:
        assert self.ended_at is None, "it has ended"
        assert now >= self.opened_at, "it has not begun"


@dataclass
class PeerRequests:
    """Record all attempts of peers, in the order in which they were opened."""

    entries: list[RecordedRequest] = field(default_factory=list)

    def open_peer(self, record: PlacementRecord, at: float) -> RecordedRequest:
        """Open the reservations of an attempt."""
        self.entries.append(RecordedRequest(record, at))
        return self.entries[-1]

    @property
    def open(self) -> list[RecordedRequest]:
        return [entry for entry in self.entries if entry.ended_at is None]

    @property
    def open_ranks(self) -> list[int]:
        """Return what is open, by the ranks of :func:`record_to`."""
        return sorted(rank for entry in self.open if (rank := entry.record.decode_rank) is not None)
