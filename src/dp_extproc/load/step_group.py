"""What this service has sent to the ranks of a server, and what their engine tells beyond it. Common to all roles.

A sample tells all the load there is, ours included, but late; our own books tell our share at once, but nothing of
other routers or direct traffic. So at each sample the part that our books of that moment do not explain is taken as the
load that others cause, and the estimate is that part plus our books as they stand. A sample thereby erases nothing that
the engine had not counted when it was taken, and counts nothing twice.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from dp_extproc.engines.model import RankSample

_SETTLED_KEPT: Final = 10_000
"""Settled reservations that a rank remembers for the next sample. A rank that is not sampled must not remember more
and more of them; between two samples no rank serves so many."""
_LEAST: Final = 1.0
"""Tokens; engines compute the last one of a prompt even if they hold them all."""
SOMEBODY: Final = 0.5
"""Requests; shares of one add up to a little less or more."""
_GRACE: Final = 10.0
"""Seconds. An engine that was wholly empty has nothing of what was sent to it so long before."""


class Reservation:
    """A request on one rank's books, from the pick until it is settled."""

    __slots__ = ("is_share", "rank", "requests", "since", "tokens", "until")

    def __init__(self, rank: "RankLoad", tokens: float, requests: float, since: float) -> None:
        self.rank = rank
        self.tokens = tokens
        """Of the prompt: to be computed on prefill, to be held on decode."""
        self.requests = requests
        self.since = since
        self.is_share = False
        """Whether one of several ranks has the request, and all have a share of it on their books."""
        self.until = math.inf
        """When it ceased to show in samples."""

    def release(self, now: float) -> None:
        """Take it off the books: its engine has worked it off.

        Of this and :meth:`withdraw` only the first call counts, so that every way out may make one.
        """
        self._settle(now, worked_off=True)

    def withdraw(self, now: float) -> None:
        """Take it off the books for any other reason, which tells nothing of what else its engine has done."""
        self._settle(now, worked_off=False)

    def _settle(self, now: float, *, worked_off: bool) -> None:
        if self in self.rank.open:
            self.rank.open.discard(self)
            # With nothing open the count is exactly zero, whatever floating point makes of shares.
            self.rank.reserved_requests = self.rank.reserved_requests - self.requests if self.rank.open else 0.0
            self.rank.group.closed(self, now, worked_off=worked_off)
            self.until = min(self.until, now)
            self.rank.settled.append(self)

    def started(self, now: float) -> None:
        """Note that the first output token has come."""


class RankLoad:
    """One DP rank of one server. Its numbers live in the lists of its group."""

    __slots__ = (
        "external_requests",
        "group",
        "index",
        "open",
        "picks",
        "position",
        "reserved_requests",
        "sample",
        "sampled_at",
        "settled",
    )  # fmt: skip

    def __init__(self, index: int, group: "StepGroup", position: int) -> None:
        self.index = index
        """The DP rank on its server."""
        self.group = group
        self.position = position
        """Its place in the lists of the group."""
        self.picks = 0
        self.external_requests = 0.0
        self.reserved_requests = 0.0
        """Sequences of all open reservations; a batch has many, and one whose rank the engine picks a share on each."""
        self.sample: RankSample | None = None
        self.sampled_at = -math.inf
        """When the engine took the sample, in our clock; never later than it really was."""
        self.open: set[Reservation] = set()
        self.settled: deque[Reservation] = deque(maxlen=_SETTLED_KEPT)

    @property
    def tokens(self) -> float:
        """The estimate of the load, which policies compare."""
        return self.group.loads[self.position]

    @property
    def external_tokens(self) -> float:
        """Tokens that the last sample showed beyond our own."""
        return self.group.external[self.position]

    @property
    def reserved_tokens(self) -> float:
        """The part of the estimate that is on our books."""
        return self.tokens - self.external_tokens

    @property
    def uncached_prompt_tokens(self) -> float:
        """Prompt tokens ever sent here, less those that the rank held already."""
        return self.group.sent[self.position]

    @property
    def kept_requests(self) -> float:
        """Of ours that the next sample may show, at whatever moment it was taken."""
        return sum(reservation.requests for books in (self.open, self.settled) for reservation in books)

    def reserve(
        self, tokens: float, now: float, requests: float = 1.0, cached: float = 0.0, *, is_share: bool = False
    ) -> Reservation:
        """Put a request on the books.

        Args:
            tokens: Of the prompt.
            now: Of the pick.
            requests: Sequences that it makes; a fraction when several ranks share what only one will get.
            cached: Prompt tokens that the rank holds already.
            is_share: Whether other ranks have the same on their books, and nobody knows which one has the request.
        """
        reservation = self.group.opened(self, tokens, max(_LEAST, tokens - cached), requests, now, is_share=is_share)
        reservation.is_share = is_share
        self.open.add(reservation)
        self.reserved_requests += requests
        self.group.sent[self.position] += tokens - cached
        self.group.reported[self.position] += tokens
        return reservation

    def absorb(self, sample: RankSample, sampled_at: float, now: float) -> None:
        """Take in what the engine told of a moment."""
        absorb([(self, sample, sampled_at)], 1, now)


def absorb(readings: Sequence[tuple[RankLoad, RankSample, float]], ranks: int, now: float) -> None:
    """Take in what an engine told of its ranks.

    A request whose rank the engine picks is a share on the books of each of them, and in the samples wholly on one. So
    what samples show beyond the requests whose rank is known is set against all shares together.

    Args:
        readings: The ranks, each with its sample, and with the moment at which it was taken.
        ranks: That the server has, sampled or not.
        now: For what turns out to be lost.
    """
    _expire(readings, now)
    ours = [_ours(rank, at) for rank, _, at in readings]
    known = [own for own, _ in ours]
    shares = [shared for _, shared in ours]
    if any(each.requests for each in shares):
        scale = ranks / len(readings)  # those that are not sampled have their shares, too
        found = _shown_in_all(readings, known, _Ours(*(scale * sum(column) for column in zip(*shares, strict=True))))
    else:
        found = [_shown(rank, sample, own) for (rank, sample, _), own in zip(readings, known, strict=True)]
    for (rank, sample, at), (tokens, others) in zip(readings, found, strict=True):
        group = rank.group
        group.reported[rank.position] = sample.used_tokens
        group.external_requests += others - rank.external_requests
        rank.external_requests = others
        rank.sample = sample
        rank.sampled_at = at
        group.learn(rank.position, sample, at)
        group.correct(rank, tokens, now)
        # A later sample is of a later moment: what was over by now cannot be in it.
        while rank.settled and rank.settled[0].until <= at:
            rank.settled.popleft()


def _expire(readings: Sequence[tuple[RankLoad, RankSample, float]], now: float) -> None:
    """Take off the books what an engine that has nothing at all must have lost."""
    all_empty = all(sample.is_empty for _, sample, _ in readings)
    for rank, sample, at in readings:
        if sample.is_empty:
            for each in [each for each in rank.open if each.since < at - _GRACE and (all_empty or not each.is_share)]:
                rank.group.expired += 1
                each.withdraw(now)


class _Ours(NamedTuple):
    """What a sample shows of our reservations."""

    tokens: float
    requests: float
    ended_tokens: float
    """The part of the tokens whose reservations have ended since the sample was taken."""

    def still_open(self, correction: float) -> float:
        """Return the part of a correction of these tokens that concerns reservations which are open."""
        return correction * (1 - self.ended_tokens / self.tokens) if self.tokens else correction


def _ours(rank: RankLoad, at: float) -> tuple[_Ours, _Ours]:
    """Return what a sample of that moment shows of a rank's own requests, and of those in shares."""
    own, shared = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for books, is_over in ((rank.open, False), (rank.settled, True)):
        for reservation in books:
            if reservation.since <= at < reservation.until:
                sums = shared if reservation.is_share else own
                tokens = rank.group.shown(reservation, at)
                sums[0] += tokens
                sums[1] += reservation.requests
                sums[2] += tokens if is_over else 0.0
    return _Ours(*own), _Ours(*shared)


def _shown(rank: RankLoad, sample: RankSample, own: _Ours) -> tuple[float, float]:
    """Give the tokens and requests that a sample shows beyond so many of ours."""
    told = sample.running_requests + sample.waiting_requests
    others = max(0.0, told - own.requests)
    excess = rank.group.told(sample) - own.tokens
    if others >= SOMEBODY:
        return max(0.0, excess), others
    # It is ours, if the engine knows of us at all.
    if 2 * told < own.requests:
        return 0.0, others
    return own.still_open(rank.group.misjudged(excess, own.tokens)), others


def _shown_in_all(
    readings: Sequence[tuple[RankLoad, RankSample, float]],
    known: Sequence[_Ours],
    shares: _Ours,
) -> Sequence[tuple[float, float]]:
    """Give the same for all ranks of a server where some requests of ours may be anywhere."""
    excess = [
        (
            rank.group.told(sample) - own.tokens,
            max(0.0, sample.running_requests + sample.waiting_requests - own.requests),
        )
        for (rank, sample, _), own in zip(readings, known, strict=True)
    ]
    all_requests = sum(requests for _, requests in excess)
    strangers = max(0.0, all_requests - shares.requests)
    if strangers >= SOMEBODY:
        all_tokens = sum(max(0.0, tokens) for tokens, _ in excess)
        part = max(0.0, all_tokens - shares.tokens) / all_tokens if all_tokens else 0.0
        return [(max(0.0, tokens) * part, requests * strangers / all_requests) for tokens, requests in excess]
    if 2 * all_requests < shares.requests:
        return [(0.0, 0.0)] * len(readings)
    beyond, group = sum(tokens for tokens, _ in excess) - shares.tokens, readings[0][0].group
    in_all = _Ours(*map(sum, zip(shares, *known, strict=True)))
    each = in_all.still_open(group.misjudged(beyond, in_all.tokens)) / len(readings)
    return [(each, 0.0)] * len(readings)


def index_from(start: int, numbers: Sequence[float], wanted: float) -> int:
    """Find a number, beginning somewhere in the list."""
    try:
        return numbers.index(wanted, start)
    except ValueError:
        return numbers.index(wanted)


class StepGroup(ABC):
    """Ranks of a server that take their steps together: with DP attention all of them, else each for itself.

    A step takes as long as its fullest rank. The lists have one number per rank of the group; policies read them
    directly, as they are read far more often than they change.
    """

    __slots__ = (
        "_knows_low",
        "_knows_top",
        "_reservations",
        "base",
        "changed",
        "due",
        "expired",
        "external",
        "external_requests",
        "floor",
        "loads",
        "low",
        "low_position",
        "ranks",
        "reported",
        "requests",
        "sent",
        "slowness",
        "start",
        "top",
    )  # fmt: skip

    def __init__(self, indices: range) -> None:
        size = len(indices)
        self.ranks = tuple(RankLoad(index, self, position) for position, index in enumerate(indices))
        self.loads = [0.0] * size
        """The estimate of each rank's load, in tokens of its role."""
        self.external = [0.0] * size
        """The part of it that others cause."""
        self.reported = [0.0] * size
        """The scraped gauge, plus what was sent since it was scraped, as ``signal: scraped`` wants it."""
        self.sent = [0.0] * size
        """Tokens ever sent."""
        self.requests = 0.0
        """Our own requests in flight."""
        self._reservations = 0
        self.external_requests = 0.0
        """Requests that the last samples showed beyond those."""
        self.expired = 0
        """Reservations that no event has ended."""
        self.due = math.inf
        """When :meth:`refresh` has something to do."""
        self.changed = True
        """Whether anything has changed since :meth:`survey`; who changes something says so."""
        self.top = 0.0
        """The greatest load, as of :meth:`survey`."""
        self.low = 0.0
        """The least load, as of :meth:`survey` ..."""
        self.low_position = 0
        """... and a rank that has it: the first one from ..."""
        self.start = 0
        """... here on. Set it at random, and one of several is found at random."""
        self.slowness = 1.0
        """How slow the server is, against the average of its pool and role."""
        self.floor = 0.0
        """What no request costs less than ..."""
        self.base = 0.0
        """... nor less than this and its tokens, times the slowness."""
        self._knows_top = True
        self._knows_low = True

    def survey(self, now: float) -> None:
        """Look for the greatest and the least load; a decision compares many groups of which few have changed."""
        if now >= self.due:
            self.refresh(now)
        loads = self.loads
        if not self._knows_top:
            self.top = max(loads)
            self._knows_top = True
        if not self._knows_low:
            self.low = min(loads)
            self.low_position = index_from(self.start, loads, self.low)
            self._knows_low = True
        self.bound()
        self.changed = False

    def load_is(self, position: int, load: float) -> None:
        """Set the load of a rank."""
        before = self.loads[position]
        self.loads[position] = load
        self.changed = True
        if load >= self.top:
            self.top = load
        elif before >= self.top:
            self._knows_top = False
        if load < self.low:
            self.low = load
            self.low_position = position
        elif position == self.low_position:
            self._knows_low = False

    def loads_are(self, loads: list[float]) -> None:
        """Set the loads of all ranks."""
        self.loads[:] = loads
        self.changed = True
        self._knows_top = self._knows_low = False

    def opened(
        self, rank: RankLoad, tokens: float, to_compute: float, requests: float, now: float, *, is_share: bool
    ) -> Reservation:
        """Take a new request on the books. Strictly for :meth:`RankLoad.reserve`."""
        self._reservations += 1
        self.requests += requests
        return self._open(rank, tokens, to_compute, requests, now, is_share=is_share)

    def closed(self, reservation: Reservation, now: float, *, worked_off: bool) -> None:
        """Take a request off the books. Strictly for :class:`Reservation`."""
        self._reservations -= 1
        # With nothing open the count is exactly zero, whatever floating point makes of shares.
        self.requests = self.requests - reservation.requests if self._reservations else 0.0
        self._close(reservation, now, worked_off=worked_off)

    def forget_external(self, now: float) -> None:
        """Take nothing for the load of others any more: what the last samples told of it is too old."""
        for rank in self.ranks:
            if rank.external_requests >= SOMEBODY:
                self.external_requests -= rank.external_requests
                rank.external_requests = self.external[rank.position] = 0.0
                self.correct(rank, 0.0, now)

    @abstractmethod
    def cost(self, position: int, after: float) -> float:
        """Tell what it costs, in tokens, to have the rank at this position at *after* tokens; after a survey."""

    @abstractmethod
    def bound(self) -> None:
        """Find out what no request can cost less than: set :attr:`floor` and :attr:`base`."""

    @abstractmethod
    def refresh(self, now: float) -> None:
        """Let time pass: loads change without events, too."""

    @abstractmethod
    def told(self, sample: RankSample) -> float:
        """Give the tokens of a sample that are comparable with our books."""

    @abstractmethod
    def shown(self, reservation: Reservation, at: float) -> float:
        """Give the tokens that a reservation had in a sample of that moment."""

    @abstractmethod
    def misjudged(self, excess: float, tokens: float) -> float:
        """Tell what to make of tokens that a sample has more (or fewer) than our *tokens*, but no more requests.

        They are ours: the lengths were not estimated right.
        """

    @abstractmethod
    def learn(self, position: int, sample: RankSample, at: float) -> None:
        """Learn from a sample of a rank, taken at a moment, what it tells of the server besides load."""

    @abstractmethod
    def correct(self, rank: RankLoad, others: float, now: float) -> None:
        """Set what others cause on a rank."""

    @abstractmethod
    def _open(
        self, rank: RankLoad, tokens: float, to_compute: float, requests: float, now: float, *, is_share: bool
    ) -> Reservation: ...

    @abstractmethod
    def _close(self, reservation: Reservation, now: float, *, worked_off: bool) -> None: ...
