"""Ranks that take their steps together, and the arithmetic of their reservations. Common to all roles."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

from dp_extproc.engines.model import RankSample
from dp_extproc.load.rank import RankLoad, Reservation

_LEAST: Final = 1.0
"""Tokens of a prompt that an engine computes at least: the last one, even if its prefix cache has all of them."""
EXTERNAL_FROM: Final = 0.5
"""Requests beyond the reservations from which on there is external load. Shares of one request add up to a little less
or more than one."""


def index_from(start: int, numbers: Sequence[float], wanted: float) -> int:
    """Return the index of a number that is in the list: the first one from *start* on, or else from the beginning."""
    try:
        return numbers.index(wanted, start)
    except ValueError:
        return numbers.index(wanted)


class External(NamedTuple):
    """Load of a rank that no reservation explains."""

    tokens: float
    """Below zero if the engine counts fewer tokens of our requests than we estimated."""
    requests: float


class StepGroup(ABC):
    """Ranks of an engine that step together: with DP attention all of them, otherwise one rank alone.

    A step takes as long as its fullest rank. The lists have one number per rank of the group. Policies read them
    directly, because they are read far more often than they change.
    """

    __slots__ = (
        "_low_is_valid", "_reservations", "_top_is_valid", "base", "changed", "due", "expired", "external",
        "external_requests", "floor", "loads", "low", "low_position", "ranks", "reported", "requests", "slowness",
        "start", "top", "uncached",
    )  # fmt: skip

    def __init__(self, indices: range) -> None:
        size = len(indices)
        self.ranks = tuple(RankLoad(index, self, position) for position, index in enumerate(indices))
        self.loads = [0.0] * size
        """The estimated load of each rank, in prompt tokens to compute or in tokens of context, depending on the
        role."""
        self.external = [0.0] * size
        """The part of each load that reservations do not explain."""
        self.reported = [0.0] * size
        """The tokens in use of each rank's last sample, and the prompt tokens since then, for ``signal: scraped``."""
        self.uncached = [0.0] * size
        """Prompt tokens of all requests so far, less those that were expected in the prefix cache."""
        self.requests = 0.0
        """Sequences of all open reservations."""
        self._reservations = 0
        self.external_requests = 0.0
        """Requests that the last samples have beyond the reservations."""
        self.expired = 0
        """Reservations that have expired."""
        self.due = math.inf
        """The time from which on :meth:`refresh` has something to do."""
        self.changed = True
        """Whether anything has changed since the last :meth:`survey`. Each change of a load sets it."""
        self.top = 0.0
        """The greatest load, as of :meth:`survey`."""
        self.low = 0.0
        """The least load, as of :meth:`survey`."""
        self.low_position = 0
        """The position of a rank with the least load, as of :meth:`survey`: the first one from :attr:`start` on."""
        self.start = 0
        """Where the search for the least load begins. A random start makes the pick among equal ranks random."""
        self.slowness = 1.0
        """How many times longer the engine takes for a token than the average of its pool and role."""
        self.floor = 0.0
        """A lower bound of the cost of any request."""
        self.base = 0.0
        """Another lower bound, to which the tokens of the request are added, times the slowness."""
        self._top_is_valid = True
        self._low_is_valid = True

    def survey(self, now: float) -> None:
        """Update the extreme loads and the bounds; a decision compares many groups, of which few have changed."""
        if now >= self.due:
            self.refresh(now)
        loads = self.loads
        if not self._top_is_valid:
            self.top = max(loads)
            self._top_is_valid = True
        if not self._low_is_valid:
            self.low = min(loads)
            self.low_position = index_from(self.start, loads, self.low)
            self._low_is_valid = True
        self.bound()
        self.changed = False

    def set_load(self, position: int, load: float) -> None:
        """Set the load of a rank."""
        before = self.loads[position]
        self.loads[position] = load
        self.changed = True
        if load >= self.top:
            self.top = load
        elif before >= self.top:
            self._top_is_valid = False
        if load < self.low:
            self.low = load
            self.low_position = position
        elif position == self.low_position:
            self._low_is_valid = False

    def set_loads(self, loads: list[float]) -> None:
        """Set the loads of all ranks."""
        self.loads[:] = loads
        self.changed = True
        self._top_is_valid = self._low_is_valid = False

    def reserve(
        self, rank: RankLoad, tokens: float, now: float, requests: float, cached: float, *, is_share: bool
    ) -> Reservation:
        """Open a reservation; see :meth:`RankLoad.reserve`."""
        reservation = Reservation(rank, tokens, max(_LEAST, tokens - cached), requests, now, is_share=is_share)
        self._reservations += 1
        self.requests += requests
        self._open(reservation, now)
        rank.open.add(reservation)
        rank.reserved_requests += requests
        self.uncached[rank.position] += tokens - cached
        self.reported[rank.position] += tokens
        return reservation

    def end(self, reservation: Reservation, now: float, *, served: bool) -> None:
        """End a reservation; see :meth:`Reservation.complete` and :meth:`Reservation.cancel`."""
        rank = reservation.rank
        if reservation not in rank.open:
            return
        rank.open.discard(reservation)
        self._reservations -= 1
        # With nothing open both counts are exactly zero, whatever floating point makes of shares.
        rank.reserved_requests = rank.reserved_requests - reservation.requests if rank.open else 0.0
        self.requests = self.requests - reservation.requests if self._reservations else 0.0
        self._close(reservation, now, served=served)
        reservation.until = min(reservation.until, now)
        rank.ended.append(reservation)

    def expire(self, reservation: Reservation, now: float) -> None:
        """End the reservation of a request that the engine no longer has, though no event has ended it."""
        self.expired += 1
        self.end(reservation, now, served=False)

    def correct(self, rank: RankLoad, sample: RankSample, at: float, external: External, now: float) -> None:
        """Correct a rank by a sample.

        Args:
            rank: One of this group.
            sample: The sample.
            at: When the engine took it.
            external: The external load in it.
            now: The present time.
        """
        self.reported[rank.position] = sample.used_tokens
        self.external_requests += external.requests - rank.external_requests
        rank.external_requests = external.requests
        rank.sample = sample
        rank.sampled_at = at
        self._learn(rank.position, sample, at)
        self._set_external(rank, external.tokens, now)
        # A later sample is of a later moment: what had ended by then cannot be in it.
        while rank.ended and rank.ended[0].until <= at:
            rank.ended.popleft()

    def forget_external(self, now: float) -> None:
        """Drop the external load of ranks that have external requests: the samples that had them are too old."""
        for rank in self.ranks:
            if rank.external_requests >= EXTERNAL_FROM:
                self.external_requests -= rank.external_requests
                rank.external_requests = self.external[rank.position] = 0.0
                self._set_external(rank, 0.0, now)

    @abstractmethod
    def first_token(self, reservation: Reservation, now: float) -> None:
        """Note that the first output token of a request has come."""

    @abstractmethod
    def cost(self, position: int, after: float) -> float:
        """Return what it costs, in tokens, to have the rank at a position at *after* tokens. Needs a :meth:`survey`."""

    @abstractmethod
    def bound(self) -> None:
        """Set the lower bounds :attr:`floor` and :attr:`base`."""

    @abstractmethod
    def refresh(self, now: float) -> None:
        """Update what changes with time alone, and set :attr:`due`."""

    @abstractmethod
    def tokens_in(self, sample: RankSample) -> float:
        """Return the tokens of a sample that are comparable with the tokens of reservations."""

    @abstractmethod
    def tokens_at(self, reservation: Reservation, at: float) -> float:
        """Return the tokens that a sample of that moment contains of a reservation."""

    @abstractmethod
    def misestimated(self, excess: float, tokens: float) -> float:
        """Attribute a token difference when the request counts agree: our estimate of their lengths was wrong.

        Args:
            excess: Tokens that a sample has beyond the reservations; below zero if it has fewer.
            tokens: Tokens of the reservations.

        Returns:
            The tokens by which the estimate of the load is corrected.
        """

    @abstractmethod
    def _learn(self, position: int, sample: RankSample, at: float) -> None:
        """Learn from a sample what it has of the engine besides load."""

    @abstractmethod
    def _set_external(self, rank: RankLoad, tokens: float, now: float) -> None:
        """Set the external tokens of a rank, whose external requests are up to date."""

    @abstractmethod
    def _open(self, reservation: Reservation, now: float) -> None: ...

    @abstractmethod
    def _close(self, reservation: Reservation, now: float, *, served: bool) -> None: ...
