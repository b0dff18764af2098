"""A sample against the reservations: which part of a rank's reported load is ours, and which part is external.

A sample has all load of its moment, but it is late. Reservations of this replica and of its peers are up to date, but
direct traffic and other routers have none. So what a sample has beyond the reservations of its own moment is external
load, and the estimate is that part and the reservations as they stand now. A sample thus takes nothing back that the
engine had not counted when the sample was taken, and counts nothing twice.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from dp_extproc.engines.model import RankSample
from dp_extproc.load.step_group import EXTERNAL_FROM, External, RankLoad

_GRACE: Final = 10.0
"""Seconds from a pick until an engine that reports no request at all must have lost it."""


class Reading(NamedTuple):
    """A sample of one rank."""

    rank: RankLoad
    sample: RankSample
    at: float
    """When the engine took the sample, by the clock of this process."""

    @property
    def requests(self) -> int:
        return self.sample.running_requests + self.sample.waiting_requests

    @property
    def tokens(self) -> float:
        return self.rank.group.tokens_in(self.sample)


class _Ours(NamedTuple):
    """What a sample contains of reservations."""

    tokens: float
    requests: float
    ended_tokens: float
    """The part of the tokens whose reservations have ended since the sample was taken."""

    def still_open(self, correction: float) -> float:
        """Return the part of a correction of these tokens that concerns open reservations."""
        return correction * (1 - self.ended_tokens / self.tokens) if self.tokens else correction


def absorb(readings: Sequence[Reading], ranks: int, now: float) -> None:
    """Correct the external load of an engine's ranks by samples of them.

    A request whose rank the engine picks has a share on each rank, while the samples have all of it on one. So the
    samples' excess over the reservations of known rank is compared with the sum of all shares.

    Args:
        readings: One for each rank that was sampled.
        ranks: How many ranks the engine has, sampled or not.
        now: The time at which lost requests expire.
    """
    _expire_lost(readings, now)
    ours = [_ours_in(reading) for reading in readings]
    known = [own for own, _ in ours]
    shares = [shared for _, shared in ours]
    if any(each.requests for each in shares):
        scale = ranks / len(readings)  # ranks without a sample have shares, too
        all_shares = _Ours(*(scale * sum(column) for column in zip(*shares, strict=True)))
        external = _external_in_all(readings, known, all_shares)
    else:
        external = [_external_in(reading, own) for reading, own in zip(readings, known, strict=True)]
    for (rank, sample, at), found in zip(readings, external, strict=True):
        rank.group.correct(rank, sample, at, found, now)


def _expire_lost(readings: Sequence[Reading], now: float) -> None:
    """Expire reservations of requests that an engine must have lost, as it reports no request at all."""
    all_empty = all(reading.sample.is_empty for reading in readings)
    for rank, sample, at in readings:
        if sample.is_empty:
            for each in [each for each in rank.open if each.since < at - _GRACE and (all_empty or not each.is_share)]:
                rank.group.expire(each, now)


def _ours_in(reading: Reading) -> tuple[_Ours, _Ours]:
    """Return what a sample contains of the reservations of this very rank, and of shares."""
    rank, _, at = reading
    own, shared = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]  # in the order of _Ours
    for reservations, has_ended in ((rank.open, False), (rank.ended, True)):
        for reservation in reservations:
            if reservation.since <= at < reservation.until:
                sums = shared if reservation.is_share else own
                tokens = rank.group.tokens_at(reservation, at)
                sums[0] += tokens
                sums[1] += reservation.requests
                sums[2] += tokens if has_ended else 0.0
    return _Ours(*own), _Ours(*shared)


def _external_in(reading: Reading, own: _Ours) -> External:
    """Return the external tokens and requests in a sample of a rank without shares."""
    requests = max(0.0, reading.requests - own.requests)
    excess = reading.tokens - own.tokens
    if requests >= EXTERNAL_FROM:
        return External(max(0.0, excess), requests)
    if 2 * reading.requests < own.requests:  # it counts few of ours: it is too old, or of another engine
        return External(0.0, requests)
    return External(own.still_open(reading.rank.group.misestimated(excess, own.tokens)), requests)


def _external_in_all(readings: Sequence[Reading], known: Sequence[_Ours], shares: _Ours) -> Sequence[External]:
    """Return the external tokens and requests for each rank of an engine that has shares of requests."""
    excess = [
        (each.tokens - own.tokens, max(0.0, each.requests - own.requests))
        for each, own in zip(readings, known, strict=True)
    ]
    all_requests = sum(requests for _, requests in excess)
    external = max(0.0, all_requests - shares.requests)
    if external >= EXTERNAL_FROM:
        all_tokens = sum(max(0.0, tokens) for tokens, _ in excess)
        part = max(0.0, all_tokens - shares.tokens) / all_tokens if all_tokens else 0.0
        return [External(max(0.0, tokens) * part, requests * external / all_requests) for tokens, requests in excess]
    if 2 * all_requests < shares.requests:  # likewise too few of ours
        return [External(0.0, 0.0)] * len(readings)
    beyond = sum(tokens for tokens, _ in excess) - shares.tokens
    in_all = _Ours(*map(sum, zip(shares, *known, strict=True)))
    each = in_all.still_open(readings[0].rank.group.misestimated(beyond, in_all.tokens)) / len(readings)
    return [External(each, 0.0)] * len(readings)
