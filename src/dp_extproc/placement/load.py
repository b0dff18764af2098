"""The load of each DP rank: what its engine last told, and what this service has sent it. One estimate out of both.

A sample tells all the load there is, ours included, but late; our own books tell our share at once, but nothing of
other routers or direct traffic. So at each sample the part that our books do not explain is taken as the load that
others cause, and the estimate is that part plus our books as they stand. A sample thereby erases nothing that the
engine had not counted when it was taken, and counts nothing twice.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from dp_extproc.fleet.endpoint import Endpoint, EngineFacts, RankSample, Role
from dp_extproc.fleet.recipe import Capabilities

_SETTLED_KEPT: Final = 10_000
"""Released reservations that a rank remembers for the next sample. A rank that is not sampled must not remember more
and more of them; between two samples no rank serves so many."""


class Freshness(IntEnum):
    """How far an endpoint's load can be trusted; lower is better."""

    FRESH = 0
    STALE = 1
    """No sample for a while, or the engine refuses connections. Used when no endpoint of its role is fresh."""
    UNKNOWN = 2
    """No sample ever, but the engine has told its ranks. Used when no endpoint of its role has ever had one."""


@dataclass(slots=True, eq=False)
class Reservation:
    """Tokens on one rank's books, from the pick until they are released."""

    rank: "RankLoad"
    tokens: float
    requests: float
    since: float
    until: float = math.inf

    def release(self, now: float) -> None:
        """Take the tokens off the books. Only the first call counts, so that every way out may call it."""
        if self.until == math.inf:
            self.until = now
            self.rank.settle(self)


class RankLoad:
    """One DP rank of one server."""

    __slots__ = (
        "_open",
        "_settled",
        "index",
        "others",
        "own_requests",
        "own_tokens",
        "picks",
        "sample",
        "sampled_at",
        "tokens",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.picks = 0
        self.own_tokens = 0.0
        self.own_requests = 0.0
        self.others = 0.0
        """Tokens that the last sample showed beyond our own."""
        self.tokens = 0.0
        """The estimate that policies compare: ``others + own_tokens``. Kept up to date, as it is read far more often
        than it changes."""
        self.sample: RankSample | None = None
        self.sampled_at = -math.inf
        """When the engine took the sample, in our clock; never later than it really was."""
        self._open: set[Reservation] = set()
        self._settled: deque[Reservation] = deque(maxlen=_SETTLED_KEPT)

    def reserve(self, tokens: float, now: float, requests: float = 1.0) -> Reservation:
        reservation = Reservation(self, tokens, requests, now)
        self._open.add(reservation)
        self.own_tokens += tokens
        self.own_requests += requests
        self.tokens += tokens
        return reservation

    def settle(self, reservation: Reservation) -> None:
        """Strictly for :meth:`Reservation.release`."""
        self._open.discard(reservation)
        self._settled.append(reservation)
        # With nothing open the books are exactly zero, whatever floating point made of the sums.
        self.own_tokens = self.own_tokens - reservation.tokens if self._open else 0.0
        self.own_requests = self.own_requests - reservation.requests if self._open else 0.0
        self.tokens = self.others + self.own_tokens

    def absorb(self, sample: RankSample, sampled_at: float) -> None:
        """Take in what the engine told of a moment."""
        counted = sum(
            reservation.tokens
            for books in (self._open, self._settled)
            for reservation in books
            if reservation.since <= sampled_at < reservation.until
        )
        self.others = max(0.0, sample.tokens - counted)
        self.tokens = self.others + self.own_tokens
        self.sample = sample
        self.sampled_at = sampled_at
        # A later sample is of a later moment: what was over by now cannot be in it.
        while self._settled and self._settled[0].until <= sampled_at:
            self._settled.popleft()


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A host, and those of its ranks that a request may go to."""

    host: "HostLoad"
    ranks: Sequence[RankLoad]
    """At least one."""


class HostLoad:
    """One endpoint: its ranks and how well it is known."""

    __slots__ = ("_demoted", "address", "candidate", "capabilities", "endpoint", "facts", "ranks", "sampled")

    def __init__(self, endpoint: Endpoint, address: str, facts: EngineFacts, capabilities: Capabilities) -> None:
        self.endpoint = endpoint
        self.address = address
        """``IP:port``, what Envoy dials."""
        self.facts = facts
        self.capabilities = capabilities
        self.ranks = tuple(RankLoad(index) for index in range(facts.dp_ranks))
        usable = capabilities.prefill_ranks(facts.dp_ranks) if endpoint.role is Role.PREFILL else range(facts.dp_ranks)
        self.candidate = Candidate(self, [self.ranks[index] for index in usable])
        """The host with every rank that can serve."""
        self.sampled = -math.inf
        """When the last good load page was asked for."""
        self._demoted = False

    @property
    def tokens(self) -> float:
        return sum(rank.tokens for rank in self.ranks)

    def freshness(self, now: float, stale_after: float) -> Freshness:
        if self.sampled == -math.inf:
            return Freshness.UNKNOWN
        return Freshness.STALE if self._demoted or now - self.sampled > stale_after else Freshness.FRESH

    def absorb(self, samples: tuple[RankSample, ...], started: float) -> None:
        """Take in a load page that was asked for at *started*. Ranks that the server does not have are left out."""
        before, self.sampled = self.sampled, started
        self._demoted = False
        for sample in samples:
            if 0 <= sample.dp_rank < len(self.ranks):
                rank = self.ranks[sample.dp_rank]
                rank.absorb(sample, _moment_of(sample, started, rank, before))

    def demote(self) -> None:
        """Trust the samples no longer, however young: the engine is known to be away."""
        self._demoted = True

    def reserve(self, rank: int | None, tokens: float, now: float) -> tuple[Reservation, ...]:
        """Put a request on the books. When the engine itself picks the rank, each rank carries an even share."""
        if rank is not None:
            self.ranks[rank].picks += 1
            return (self.ranks[rank].reserve(tokens, now),)
        share = 1.0 / len(self.ranks)
        return tuple(each.reserve(tokens * share, now, share) for each in self.ranks)


def _moment_of(sample: RankSample, started: float, rank: RankLoad, before: float) -> float:
    """When a sample was taken: by the page's own time stamps if it has them, else by whether it has moved.

    Gauges without a time stamp may be as old as they like while they stay the same; once they have changed they
    are younger than the page before.
    """
    if sample.age is not None:
        return started - sample.age
    return rank.sampled_at if sample == rank.sample else max(rank.sampled_at, before)
