"""Which host and which rank get a request. Each policy is a few lines over the same estimate."""

from collections.abc import Sequence
from random import Random
from typing import Final

from dp_extproc.config.schema import HostPolicy, RankPolicy
from dp_extproc.placement.load import Candidate


class Turn:
    """Whose turn it is in a round robin; one for each pool and role."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> int:
        turn = self._next % count
        self._next = turn + 1
        return turn


def pick(
    candidates: Sequence[Candidate], host: HostPolicy, rank: RankPolicy, rng: Random, turn: Turn
) -> tuple[Candidate, int | None]:
    """Pick a host and a rank on it.

    Args:
        candidates: At least one, equally eligible.
        host: How to pick the host.
        rank: How to pick the rank on it.
        rng: For random picks, and for ties: replicas that broke them alike would pile up on one rank.
        turn: For the round robin.

    Returns:
        The candidate, and the rank; None leaves the rank to the engine.
    """
    if host is HostPolicy.LEAST_TOKENS:
        # Flat over every rank of every host: a host with many idle ranks is likelier than one with a single one.
        slots = [(candidate, each) for candidate in candidates for each in candidate.ranks]
    else:
        chosen = candidates[0] if len(candidates) == 1 else _HOST_POLICIES[host](candidates, rng, turn)
        if rank is RankPolicy.NONE:
            return chosen, None
        slots = [(chosen, each) for each in chosen.ranks]
    chosen, least = slots[_least([each.tokens for _, each in slots], rng)]
    return chosen, None if rank is RankPolicy.NONE else least.index


def _least(loads: Sequence[float], rng: Random) -> int:
    """Give the index of the least load, ties at random."""
    least = min(loads)
    if loads.count(least) == 1:
        return loads.index(least)
    return rng.choice([index for index, load in enumerate(loads) if load == least])


def _round_robin(candidates: Sequence[Candidate], _rng: Random, turn: Turn) -> Candidate:
    return candidates[turn.take(len(candidates))]


def _random(candidates: Sequence[Candidate], rng: Random, _turn: Turn) -> Candidate:
    return rng.choice(candidates)


def _power_of_two(candidates: Sequence[Candidate], rng: Random, _turn: Turn) -> Candidate:
    """Take the less loaded of two hosts drawn at random."""
    two = rng.sample(candidates, 2)
    return two[_least([candidate.host.tokens / len(candidate.host.ranks) for candidate in two], rng)]


_HOST_POLICIES: Final = {
    HostPolicy.ROUND_ROBIN: _round_robin,
    HostPolicy.RANDOM: _random,
    HostPolicy.POWER_OF_TWO: _power_of_two,
}
