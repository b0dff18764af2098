"""Ranks that step together, the reservations on them, and the arithmetic of their loads. Common to all roles.

Reservations and ranks are records. Only their step group changes them, and sums them up.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dp_extproc.engines.model import RankSample

_ENDED_KEPT: Final = 10_000
"""Ended reservations that a rank remembers for the next sample. It bounds the memory of a rank that is never sampled;
between two samples no rank serves so many requests."""
_LEAST: Final = 1.0
"""Tokens of a prompt that an engine computes at least: the last one, even if its prefix cache has all of them."""
DOUBTFUL: Final = 60.0
"""Seconds for which a request that counts as computed may show in samples without an event of its own. Afterwards the
event is lost."""
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


@dataclass(slots=True, eq=False, repr=False)
class Reservation:
    """A request on one rank, from the pick until an event ends it."""

    rank: "RankLoad"
    tokens: float
    """Tokens of the prompt."""
    to_compute: float
    """Tokens of the prompt that this rank has to compute; 0 on decode endpoints."""
    requests: float
    """Sequences that the request makes, or the rank's share of them."""
    since: float
    """When the rank was picked."""
    is_share: bool
    """Whether the engine picks the rank, so that one of several ranks has the request and each has a share."""
    until: float = math.inf
    """When the reservation ceased to be load of the rank: its prompt counts as computed, or it has ended."""
    ended_at: float = math.inf
    """When an event of the request itself ended the reservation. Until then samples may still show the request, though
    other responses show that its prompt is computed: its KV cache is sent, or the conclusion came too early."""
    first_token_at: float = math.inf
    waiting: float = 0.0
    """Prompt tokens that no prefill step has taken in yet."""
    running: float = 0.0
    """Prompt tokens in the running prefill step."""

    def first_token(self, now: float) -> None:
        """Note that the first output token has come."""
        self.rank.group.first_token(self, now)

    def complete(self, now: float) -> None:
        """End the reservation: the engine has served the request. After the first end a further one has no effect."""
        self.rank.group.end(self, now, served=True)

    def cancel(self, now: float) -> None:
        """End the reservation of a request that was not served; this is no evidence of how far the engine is."""
        self.rank.group.end(self, now, served=False)


@dataclass(slots=True, eq=False, repr=False)
class RankLoad:
    """One DP rank of one endpoint. Its loads are in the lists of its step group, in tokens."""

    index: int
    """The DP rank in its engine."""
    group: "StepGroup"
    position: int
    """The index of the rank in the lists of its group."""
    picks: int = 0
    """Requests for which this replica has picked the rank."""
    external_requests: float = 0.0
    """Requests that the last sample has beyond the reservations."""
    reserved_requests: float = 0.0
    """Sequences of all open reservations; a batch has many, and a share of a request a fraction."""
    sample: RankSample | None = None
    """The last sample."""
    sampled_at: float = -math.inf
    """When the engine took that sample, by the clock of this process; never later than it really was."""
    open: set[Reservation] = field(default_factory=set)
    ended: deque[Reservation] = field(default_factory=lambda: deque(maxlen=_ENDED_KEPT))
    """Ended reservations that the next sample may still contain, in the order of their ends."""

    def doubtful_requests(self, at: float) -> float:
        """Return the requests that a sample of that moment may contain, though they count as computed by then."""
        return sum(
            each.requests
            for kept in (self.open, self.ended)
            for each in kept
            if each.until <= at < min(each.ended_at, each.until + DOUBTFUL)
        )

    @property
    def tokens(self) -> float:
        """The estimated load, which policies compare."""
        return self.group.loads[self.position]

    @property
    def external_tokens(self) -> float:
        """Tokens that the last sample has beyond the reservations."""
        return self.group.external[self.position]

    @property
    def reserved_tokens(self) -> float:
        """The part of the load that reservations cause."""
        return self.tokens - self.external_tokens

    @property
    def uncached_prompt_tokens(self) -> float:
        """Prompt tokens of all requests so far, less those that were expected in the rank's prefix cache."""
        return self.group.uncached[self.position]

    def reserve(
        self, tokens: float, now: float, requests: float = 1.0, cached: float = 0.0, *, is_share: bool = False
    ) -> Reservation:
        """Reserve what a request needs.

        Args:
            tokens: Tokens of the prompt.
            now: The time of the pick.
            requests: Sequences that the request makes; a fraction for a share of it.
            cached: Prompt tokens that are expected in the rank's prefix cache.
            is_share: Whether other ranks have the same reservation, because the engine picks one of them.
        """
        return self.group.reserve(self, tokens, now, requests, cached, is_share=is_share)


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
        """The estimated load of each rank: prompt tokens to compute in prefill, tokens of context in decode."""
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
        """A lower bound of :meth:`cost`, in tokens, for any request."""
        self.base = 0.0
        """Another lower bound, to which a policy adds the tokens of the request, times the slowness."""
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
        """Open a reservation on a rank of this group; see :meth:`RankLoad.reserve` for the arguments."""
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
        reservation.until, reservation.ended_at = min(reservation.until, now), now
        rank.ended.append(reservation)

    def expire(self, reservation: Reservation, now: float) -> None:
        """End the reservation of a request that the engine no longer has, without an event."""
        self.expired += 1
        self.end(reservation, now, served=False)

    def correct(self, rank: RankLoad, sample: RankSample, at: float, external: External, now: float) -> None:
        """Correct a rank of this group by a sample that the engine took at *at*, and by the external load in it."""
        self.reported[rank.position] = sample.used_tokens
        self.external_requests += external.requests - rank.external_requests
        rank.external_requests = external.requests
        rank.sample = sample
        rank.sampled_at = at
        self._learn(rank.position, sample, at)
        self._set_external(rank, external.tokens, now)
        # A later sample is of a later moment: what had ended by then cannot be in it.
        while rank.ended and rank.ended[0].ended_at <= at:
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

        A sample has *excess* more tokens than the *tokens* of the reservations; below zero if it has fewer. The result
        is the tokens by which the estimate of the load is corrected.
        """

    @abstractmethod
    def _learn(self, position: int, sample: RankSample, at: float) -> None:
        """Learn from a sample what it shows of the engine besides load."""

    @abstractmethod
    def _set_external(self, rank: RankLoad, tokens: float, now: float) -> None:
        """Set the external tokens of a rank, whose external requests are up to date."""

    @abstractmethod
    def _open(self, reservation: Reservation, now: float) -> None: ...

    @abstractmethod
    def _close(self, reservation: Reservation, now: float, *, served: bool) -> None: ...
