"""Which host and which rank get a request. Each policy is a few lines over the same estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, TypeVar

from dp_extproc.config.schema import HostPolicy, RankPolicy
from dp_extproc.placement.load import HostLoad, RankLoad

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host, and those of its ranks that the request may go to."""

    host: HostLoad
    ranks: Sequence[RankLoad]
    """At least one."""


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
    chosen = candidates[0] if len(candidates) == 1 else _HOST_POLICIES[host](candidates, rng, turn)
    if rank is RankPolicy.NONE:
        return chosen, None
    return chosen, _least(chosen.ranks, _rank_tokens, rng).index


def _least_tokens(candidates: Sequence[Candidate], rng: Random, _turn: Turn) -> Candidate:
    """Take the host of the least loaded rank of all: the flat minimum over every rank of every host."""
    return _least(candidates, _least_rank_tokens, rng)


def _round_robin(candidates: Sequence[Candidate], _rng: Random, turn: Turn) -> Candidate:
    return candidates[turn.take(len(candidates))]


def _random(candidates: Sequence[Candidate], rng: Random, _turn: Turn) -> Candidate:
    return rng.choice(candidates)


def _power_of_two(candidates: Sequence[Candidate], rng: Random, _turn: Turn) -> Candidate:
    """Take the less loaded of two hosts drawn at random."""
    return _least(rng.sample(candidates, 2), _mean_tokens, rng)


def _least_rank_tokens(candidate: Candidate) -> float:
    return min(map(_rank_tokens, candidate.ranks))


def _mean_tokens(candidate: Candidate) -> float:
    return candidate.host.tokens / len(candidate.host.ranks)


def _rank_tokens(rank: RankLoad) -> float:
    return rank.tokens


def _least(items: Sequence[T], load: Callable[[T], float], rng: Random) -> T:
    loads = [load(item) for item in items]
    least = min(loads)
    ties = [item for item, tokens in zip(items, loads, strict=True) if tokens == least]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


_HOST_POLICIES: Final = {
    HostPolicy.LEAST_TOKENS: _least_tokens,
    HostPolicy.ROUND_ROBIN: _round_robin,
    HostPolicy.RANDOM: _random,
    HostPolicy.POWER_OF_TWO: _power_of_two,
}
