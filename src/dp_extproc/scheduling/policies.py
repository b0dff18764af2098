"""Which host and which rank get a request. Each policy is a few lines over the same estimate."""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import HostPolicy, PolicySettings, RankPolicy
from dp_extproc.load.endpoint import Candidate, EndpointLoad, Part
from dp_extproc.load.rank import RankLoad
from dp_extproc.load.step_group import StepGroup, index_from
from dp_extproc.prefix_cache.index import Held

REACH: Final = 8
"""Of more hosts than these so many are compared, others for each request: a decision costs the same in every fleet.
Simulated on 32 prefill servers, mean time to first token: 1040 ms with 6, 1015 with 8, 998 with 24, 987 with 32."""

_COUNTED: Final = 32
"""Of more ranks than these nobody counts those that are loaded alike: the first one from a random place on is taken."""

NOTHING_HELD: Final[Held[RankLoad]] = Held({}, 0.0)

_Pick = tuple[Candidate, RankLoad | None]


class Policy:
    """Picks hosts and ranks for one role of one pool."""

    def __init__(self, settings: PolicySettings, signal: LoadSignal, rng: Random) -> None:
        """Set up.

        Args:
            settings: Which policies.
            signal: What the tokens of a rank are.
            rng: For random picks, and for ties: replicas that broke them alike would pile up on one rank.
        """
        self._host = settings.host
        self._rank = settings.dp_rank
        self._tokens: Callable[[StepGroup], list[float]] = _reported if signal is LoadSignal.SCRAPED else _loads
        self._rng = rng
        self._turn = 0
        self._first = 0
        """Whose turn it was when the first of those within reach was taken for that."""

    def within_reach(self, hosts: Sequence[EndpointLoad], held: Held[RankLoad]) -> Sequence[EndpointLoad]:
        """Leave out what is too much to compare; never a host that holds a part of the prompt."""
        if len(hosts) <= REACH:
            self._first = 0
            return hosts
        if self._host is HostPolicy.ROUND_ROBIN:
            self._first = self._turn
            start = self._turn % len(hosts)
        else:
            start = int(self._rng.random() * len(hosts))
        near = list(hosts[start : start + REACH])
        if len(near) < REACH:
            near += hosts[: REACH - len(near)]
        if held.by_slot:
            holders = {rank.group for rank in held.by_slot}
            near += [host for host in hosts if host not in near and not holders.isdisjoint(host.groups)]
        return near

    def pick(
        self,
        candidates: Sequence[Candidate],
        tokens: float,
        now: float,
        *,
        held: Held[RankLoad] = NOTHING_HELD,
        pinned: bool = False,
    ) -> _Pick:
        """Pick a host and a rank on it.

        Args:
            candidates: At least one, equally eligible.
            tokens: Of the prompt.
            now: For what changes with time alone.
            held: Which of those tokens ranks hold already.
            pinned: Whether the client has chosen the rank, so that none is left to the engine.

        Returns:
            The candidate, and the rank; None leaves the rank to the engine.
        """
        if self._rank is RankPolicy.NONE and self._host is HostPolicy.LOCKSTEP and not pinned:
            return self._cheapest_anywhere(candidates, tokens - held.elsewhere, now), None
        if self._host is HostPolicy.LOCKSTEP:
            chosen, least = self._lockstep(candidates, tokens, now, held)
        elif self._host is HostPolicy.LEAST_TOKENS:
            chosen, least = self._least(candidates, self._tokens, now, held)
        else:
            chosen = candidates[0] if len(candidates) == 1 else self._pick_host(candidates)
            least = None
        if self._rank is RankPolicy.NONE and not pinned:
            return chosen, None
        if self._rank is RankPolicy.TOKEN_ROUND_ROBIN:
            return self._least((chosen,), _sent, now, NOTHING_HELD)
        return (chosen, least) if least is not None else self._least((chosen,), self._tokens, now, held)

    def _lockstep(
        self, candidates: Sequence[Candidate], tokens: float, now: float, held: Held[RankLoad]
    ) -> tuple[Candidate, RankLoad]:
        """Take the group where the request costs least, on its least loaded rank or one that holds its beginning."""
        cheapest, found = _cheapest(candidates, tokens - held.elsewhere, now)
        holders = []
        for rank, cached in held.by_slot.items():
            cost = rank.group.cost(rank.position, rank.tokens + tokens - cached)
            if cost <= cheapest and (candidate_of_rank := _candidate_of(rank, candidates)) is not None:
                holders.append((cost, -cached, self._rng.random(), candidate_of_rank, rank))
        if holders:
            return min(holders, key=_first_three)[3:]
        chosen, part, low = found[0] if len(found) == 1 else self._rng.choice(found)
        group = part.group
        if part.positions is None and len(group.ranks) > _COUNTED:
            group.start = int(self._rng.random() * len(group.ranks))
            return chosen, group.ranks[group.low_position]
        return chosen, part.of(group.ranks)[self._one_of(part.of(group.loads), low)]

    def _cheapest_anywhere(self, candidates: Sequence[Candidate], tokens: float, now: float) -> Candidate:
        """Take the host where the request costs least if any of its ranks may get it."""
        costs = [_mean_cost(candidate, tokens, now) for candidate in candidates]
        return candidates[self._one_of(*_with_least(costs))]

    def _least(
        self,
        candidates: Sequence[Candidate],
        numbers: Callable[[StepGroup], list[float]],
        now: float,
        held: Held[RankLoad],
    ) -> tuple[Candidate, RankLoad]:
        """Take the least number of all ranks of all candidates, less what a rank holds: no host is preferred."""
        least = math.inf
        found: list[tuple[Candidate, Part, Sequence[float]]] = []
        is_surveyed = numbers is _loads and not held.by_slot
        for candidate in candidates:
            for part in candidate.parts:
                group = part.group
                if group.changed or now >= group.due:
                    group.survey(now)
                if is_surveyed and group.low > least:
                    continue  # there is nothing to be found
                own = part.of(numbers(group))
                if held.by_slot:
                    ranks = part.of(part.group.ranks)
                    own = [
                        number - held.by_slot.get(rank, held.elsewhere) for number, rank in zip(own, ranks, strict=True)
                    ]
                low = group.low if is_surveyed and part.positions is None else min(own)
                if low < least:
                    least = low
                    found = [(candidate, part, own)]
                elif low == least:
                    found.append((candidate, part, own))
        if len(found) > 1:  # each rank its chance: a host with several is likelier than one with a single one
            chances = [len(own) if len(own) > _COUNTED else own.count(least) for _, _, own in found]
            found = self._rng.choices(found, chances)
        chosen, part, own = found[0]
        return chosen, part.of(part.group.ranks)[self._one_of(own, least)]

    def _one_of(self, numbers: Sequence[float], wanted: float) -> int:
        """Give the index of a number, any of them at random."""
        if len(numbers) > _COUNTED:
            return index_from(int(self._rng.random() * len(numbers)), numbers, wanted)
        if numbers.count(wanted) == 1:
            return numbers.index(wanted)
        return self._rng.choice([index for index, number in enumerate(numbers) if number == wanted])

    def _pick_host(self, candidates: Sequence[Candidate]) -> Candidate:
        if self._host is HostPolicy.ROUND_ROBIN:
            turn = self._turn - self._first
            self._turn += 1
            return candidates[turn % len(candidates)]
        if self._host is HostPolicy.RANDOM:
            return self._rng.choice(candidates)
        if self._host is HostPolicy.POWER_OF_TWO:
            two = self._rng.sample(candidates, 2)
            return two[self._one_of(*_with_least([self._mean_tokens(each) for each in two]))]
        return candidates[
            self._one_of(*_with_least([each.endpoint.requests / len(each.endpoint.ranks) for each in candidates]))
        ]

    def _mean_tokens(self, candidate: Candidate) -> float:
        return sum(sum(self._tokens(group)) for group in candidate.endpoint.groups) / len(candidate.endpoint.ranks)


def _cheapest(
    candidates: Sequence[Candidate], tokens: float, now: float
) -> tuple[float, list[tuple[Candidate, Part, float]]]:
    """Give the least cost of a request, and where it costs that, each with its least load."""
    cheapest = math.inf
    found: list[tuple[Candidate, Part, float]] = []
    for candidate in candidates:
        for part in candidate.parts:
            group = part.group
            if group.changed or now >= group.due:
                group.survey(now)
            if group.floor > cheapest or group.base + tokens * group.slowness > cheapest:
                continue  # without a look at all that it costs
            if part.positions is None:
                position, low = group.low_position, group.low
            else:
                position = min(part.positions, key=group.loads.__getitem__)
                low = group.loads[position]
            cost = group.cost(position, low + tokens)
            if cost < cheapest:
                cheapest = cost
                found = [(candidate, part, low)]
            elif cost == cheapest:
                found.append((candidate, part, low))
    return cheapest, found


def _mean_cost(candidate: Candidate, tokens: float, now: float) -> float:
    """Give what a request costs on average over the ranks of a host."""
    costs: list[float] = []
    for part in candidate.parts:
        group = part.group
        group.survey(now)
        costs += [group.cost(rank.position, rank.tokens + tokens) for rank in part.of(group.ranks)]
    return sum(costs) / len(costs)


def _with_least(numbers: Sequence[float]) -> tuple[Sequence[float], float]:
    return numbers, min(numbers)


def _first_three(holder: tuple[float, float, float, Candidate, RankLoad]) -> tuple[float, float, float]:
    return holder[:3]


def _candidate_of(rank: RankLoad, candidates: Sequence[Candidate]) -> Candidate | None:
    """Find the candidate that a rank belongs to, if it may be taken."""
    for candidate in candidates:
        for part in candidate.parts:
            if part.group is rank.group and (part.positions is None or rank.position in part.positions):
                return candidate
    return None


def _loads(group: StepGroup) -> list[float]:
    return group.loads


def _reported(group: StepGroup) -> list[float]:
    return group.reported


def _sent(group: StepGroup) -> list[float]:
    return group.uncached
