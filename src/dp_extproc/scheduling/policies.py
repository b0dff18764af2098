"""The policies ``policy.host`` and ``policy.dp_rank`` of a pool: which of several candidates a request goes to.

All of them read the same estimate of load, which the step groups keep as lists of numbers by rank.
"""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from random import Random
from typing import Final

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import HostPolicy, PolicySettings, RankPolicy
from dp_extproc.load.endpoint import Candidate, EndpointLoad, Part
from dp_extproc.load.step_group import RankLoad, StepGroup, index_from
from dp_extproc.prefix_cache.index import CachedTokens

REACH: Final = 8
"""Bounds the endpoints that are compared for one request, so that a pick costs the same in every fleet. In larger
fleets each request compares others. Simulated on 32 prefill endpoints, the mean time to first token was 1040 ms with 6,
1015 with 8, 998 with 24, 987 with 32."""

_COUNTED: Final = 32
"""Bounds the ranks among which ties are counted. Among more ranks, the first one from a random place on is picked."""

NOTHING_CACHED: Final[CachedTokens[RankLoad]] = CachedTokens({}, 0.0)

_Numbers = Callable[[StepGroup], list[float]]
"""Reads a list of numbers by rank from a step group."""
_loads: Final[_Numbers] = attrgetter("loads")
_reported: Final[_Numbers] = attrgetter("reported")
_uncached: Final[_Numbers] = attrgetter("uncached")
_rating: Final = itemgetter(0, 1, 2)


class Policy:
    """Picks endpoints and ranks for one role of one pool."""

    def __init__(self, settings: PolicySettings, signal: LoadSignal, rng: Random) -> None:
        """Set up; *rng* decides random picks and ties, as replicas that broke ties alike would pile up on one rank."""
        self._host = settings.host
        self._rank = settings.dp_rank
        self._tokens = _reported if signal is LoadSignal.SCRAPED else _loads
        self._rng = rng
        self._turn = 0
        """Requests so far, for round robin."""
        self._first = 0
        """The turn of the first endpoint within reach. Round robin also decides which of a large fleet these are."""

    def within_reach(self, endpoints: Sequence[EndpointLoad], cached: CachedTokens[RankLoad]) -> Sequence[EndpointLoad]:
        """Return the endpoints to compare: all or :data:`REACH`, and those that have a part of the prompt in cache."""
        if len(endpoints) <= REACH:
            self._first = 0
            return endpoints
        if self._host is HostPolicy.ROUND_ROBIN:
            self._first = self._turn
            start = self._turn % len(endpoints)
        else:
            start = int(self._rng.random() * len(endpoints))
        near = list(endpoints[start : start + REACH])
        if len(near) < REACH:
            near += endpoints[: REACH - len(near)]
        if cached.by_rank:
            holders = {rank.group for rank in cached.by_rank}
            near += [each for each in endpoints if each not in near and not holders.isdisjoint(each.groups)]
        return near

    def pick(
        self,
        candidates: Sequence[Candidate],
        tokens: float,
        now: float,
        *,
        cached: CachedTokens[RankLoad] = NOTHING_CACHED,
        pinned: bool = False,
    ) -> tuple[Candidate, RankLoad | None]:
        """Pick an endpoint and a rank on it.

        Args:
            candidates: At least one, equally eligible.
            tokens: The tokens of the prompt.
            now: Monotonic seconds, as estimates change with time.
            cached: How many of these tokens each rank has in its cache.
            pinned: Whether the client asked for the rank, so that none is left to the engine.

        Returns:
            The candidate, and the rank; None leaves the rank to the engine.
        """
        if self._rank is RankPolicy.NONE and self._host is HostPolicy.LOCKSTEP and not pinned:
            return self._cheapest_anywhere(candidates, tokens - cached.elsewhere, now), None
        if self._host is HostPolicy.LOCKSTEP:
            chosen, least = self._lockstep(candidates, tokens, now, cached)
        elif self._host is HostPolicy.LEAST_TOKENS:
            chosen, least = self._least(candidates, self._tokens, now, cached)
        else:
            chosen = candidates[0] if len(candidates) == 1 else self._pick_endpoint(candidates)
            least = None
        if self._rank is RankPolicy.NONE and not pinned:
            return chosen, None
        if self._rank is RankPolicy.TOKEN_ROUND_ROBIN:
            return self._least((chosen,), _uncached, now, NOTHING_CACHED)
        return (chosen, least) if least is not None else self._least((chosen,), self._tokens, now, cached)

    @property
    def compares(self) -> bool:
        """Whether :meth:`cost` can be compared."""
        return self._host in {HostPolicy.LOCKSTEP, HostPolicy.LEAST_TOKENS, HostPolicy.LEAST_REQUESTS}

    def cost(
        self,
        endpoints: Sequence[EndpointLoad],
        tokens: float,
        now: float,
        cached: CachedTokens[RankLoad] = NOTHING_CACHED,
    ) -> float:
        """Return the number that :meth:`pick` minimises, of the best of some endpoints.

        The costs of one role can be compared with each other. Those of prefill and decode need a weight to be added up.
        """
        candidates = [each.candidate for each in endpoints]
        if self._host is HostPolicy.LEAST_REQUESTS:
            return min(each.requests / len(each.ranks) for each in endpoints)
        if self._host is HostPolicy.LEAST_TOKENS:
            return min(min(part.of(self._tokens(part.group))) for each in candidates for part in each.parts)
        costs = [
            rank.group.cost(rank.position, rank.tokens + tokens - cached_tokens)
            for rank, cached_tokens in cached.by_rank.items()
            if _candidate_of(rank, candidates) is not None
        ]
        return min((*costs, _cheapest(candidates, tokens - cached.elsewhere, now)[0]))

    def _lockstep(
        self, candidates: Sequence[Candidate], tokens: float, now: float, cached: CachedTokens[RankLoad]
    ) -> tuple[Candidate, RankLoad]:
        """Take the step group where the request costs least: its least loaded rank, or one that has cached tokens."""
        cheapest, found = _cheapest(candidates, tokens - cached.elsewhere, now)
        holders = []
        for rank, cached_tokens in cached.by_rank.items():
            cost = rank.group.cost(rank.position, rank.tokens + tokens - cached_tokens)
            if cost <= cheapest and (candidate_of_rank := _candidate_of(rank, candidates)) is not None:
                holders.append((cost, -cached_tokens, self._rng.random(), candidate_of_rank, rank))
        if holders:
            return min(holders, key=_rating)[3:]
        chosen, part, low = found[0] if len(found) == 1 else self._rng.choice(found)
        group = part.group
        if part.positions is None and len(group.ranks) > _COUNTED:
            group.start = int(self._rng.random() * len(group.ranks))
            return chosen, group.ranks[group.low_position]
        return chosen, part.of(group.ranks)[self._one_of(part.of(group.loads), low)]

    def _cheapest_anywhere(self, candidates: Sequence[Candidate], tokens: float, now: float) -> Candidate:
        """Take the endpoint where the request costs least on average over its ranks, as the engine picks the rank."""
        return self._with_least(candidates, [_mean_cost(candidate, tokens, now) for candidate in candidates])

    def _least(
        self, candidates: Sequence[Candidate], numbers: _Numbers, now: float, cached: CachedTokens[RankLoad]
    ) -> tuple[Candidate, RankLoad]:
        """Take the rank with the least number, less its cached tokens, of all candidates: no endpoint is preferred."""
        least = math.inf
        found: list[tuple[Candidate, Part, Sequence[float]]] = []
        is_surveyed = numbers is _loads and not cached.by_rank
        for candidate in candidates:
            for part in candidate.parts:
                group = part.group
                if group.changed or now >= group.due:
                    group.survey(now)
                if is_surveyed and group.low > least:
                    continue  # no rank of it is among the least
                own = part.of(numbers(group))
                if cached.by_rank:
                    ranks = zip(own, part.of(group.ranks), strict=True)
                    own = [number - cached.by_rank.get(rank, cached.elsewhere) for number, rank in ranks]
                low = group.low if is_surveyed and part.positions is None else min(own)
                if low < least:
                    least = low
                    found = [(candidate, part, own)]
                elif low == least:
                    found.append((candidate, part, own))
        if len(found) > 1:  # each rank has the same chance, so an endpoint with several is likelier
            chances = [len(own) if len(own) > _COUNTED else own.count(least) for _, _, own in found]
            found = self._rng.choices(found, chances)
        chosen, part, own = found[0]
        return chosen, part.of(part.group.ranks)[self._one_of(own, least)]

    def _one_of(self, numbers: Sequence[float], wanted: float) -> int:
        """Return the index of a number; if several are equal, that of a random one."""
        if len(numbers) > _COUNTED:
            return index_from(int(self._rng.random() * len(numbers)), numbers, wanted)
        if numbers.count(wanted) == 1:
            return numbers.index(wanted)
        return self._rng.choice([index for index, number in enumerate(numbers) if number == wanted])

    def _pick_endpoint(self, candidates: Sequence[Candidate]) -> Candidate:
        if self._host is HostPolicy.ROUND_ROBIN:
            turn = self._turn - self._first
            self._turn += 1
            return candidates[turn % len(candidates)]
        if self._host is HostPolicy.RANDOM:
            return self._rng.choice(candidates)
        if self._host is HostPolicy.POWER_OF_TWO:
            two = self._rng.sample(candidates, 2)
            return self._with_least(two, [self._mean_tokens(each.endpoint) for each in two])
        means = [each.endpoint.requests / len(each.endpoint.ranks) for each in candidates]
        return self._with_least(candidates, means)

    def _with_least(self, candidates: Sequence[Candidate], numbers: Sequence[float]) -> Candidate:
        """Return the candidate with the least of these numbers, of which each has one."""
        return candidates[self._one_of(numbers, min(numbers))]

    def _mean_tokens(self, endpoint: EndpointLoad) -> float:
        return sum(sum(self._tokens(group)) for group in endpoint.groups) / len(endpoint.ranks)


def _cheapest(
    candidates: Sequence[Candidate], tokens: float, now: float
) -> tuple[float, list[tuple[Candidate, Part, float]]]:
    """Return the least cost of a request, and where it costs that, each with its least load."""
    cheapest = math.inf
    found: list[tuple[Candidate, Part, float]] = []
    for candidate in candidates:
        for part in candidate.parts:
            group = part.group
            if group.changed or now >= group.due:
                group.survey(now)
            if group.floor > cheapest or group.base + tokens * group.slowness > cheapest:
                continue  # the exact cost cannot be lower
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
    """Return the average cost of a request over the ranks of an endpoint."""
    costs: list[float] = []
    for part in candidate.parts:
        group = part.group
        group.survey(now)
        costs += [group.cost(rank.position, rank.tokens + tokens) for rank in part.of(group.ranks)]
    return sum(costs) / len(costs)


def _candidate_of(rank: RankLoad, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that a rank belongs to; None if the rank may not be picked."""
    for candidate in candidates:
        for part in candidate.parts:
            if part.group is rank.group and (part.positions is None or rank.position in part.positions):
                return candidate
    return None
