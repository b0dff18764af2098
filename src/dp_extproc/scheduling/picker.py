"""Picks the targets of a request from what can be paired, so that the engines of every release run it on these ranks.

What decides the rank on an endpoint differs by release: a routing field, the bootstrap room, or the engine. One
bootstrap room serves both legs, so the decode target is picked after the prefill target, from ranks that agree with it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from msgspec import Struct

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.capabilities import RankControl
from dp_extproc.engines.compatibility import group_of_pair
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Candidate, EndpointLoad, Target
from dp_extproc.load.matching import Match
from dp_extproc.load.records import RequestCost
from dp_extproc.load.step_group import RankLoad
from dp_extproc.prefix_cache.index import CachedTokens, PrefixIndex
from dp_extproc.scheduling.bootstrap_room import agree
from dp_extproc.scheduling.pairing import Pairing
from dp_extproc.scheduling.policies import NOTHING_CACHED, Policy


class Targets(Struct, frozen=True):
    """The targets of both legs of a request."""

    prefill: Target | None
    """None for an aggregated pool, whose one target computes the prompt, too."""
    decode: Target
    """The target that answers the client."""

    @property
    def group(self) -> str | None:
        """Return the revision group of the request."""
        prefill, decode = self.prefill, self.decode.endpoint.group
        return decode if prefill is None else group_of_pair(prefill.endpoint.group, decode)


class Pins(Struct, frozen=True):
    """The ranks that the client asked for, where the pool allows that."""

    prefill: int | None = None
    decode: int | None = None


NO_PINS: Final = Pins()
_DECODE_WEIGHT: Final = 0.02
"""Weight of the cost on decode where matches are compared. Decode slows down evenly as its load grows, while a queue on
prefill delays all requests after it. Simulated (bench/groups.py) on one match of 3 prefill and 1 decode engines and one
of 1 and 3, with three kinds of traffic: against 0, requests take 1 to 16 % less in all, with a time to first token 3 to
8 % longer. Against 0.02, requests take as long with 0.1, and the time to first token is 12 to 27 % longer."""

Wanted = Callable[[RankLoad], bool]
"""Whether a rank may be picked."""


class Picker:
    """Picks the targets of the requests of one pool."""

    def __init__(
        self, settings: PolicySettings, signal: LoadSignal, prefixes: PrefixIndex[RankLoad], rng: Random
    ) -> None:
        self._policies = {role: Policy(settings, signal, rng) for role in Role}
        self._prefixes = prefixes
        self._rng = rng

    def pick(
        self, pairing: Pairing, cost: RequestCost, now: float, pins: Pins = NO_PINS, *, wanted: Wanted | None = None
    ) -> Targets:
        """Pick the targets of a request.

        Args:
            pairing: What to pick from; all endpoints of a role are equally eligible.
            cost: The work that the request is.
            now: Monotonic seconds, as estimates change with time.
            pins: Ranks that the client asked for; ignored if no endpoint has them.
            wanted: Whether a rank may be picked; ignored for a role if none may. None allows every rank.
        """
        tokens, cached = cost.tokens, NOTHING_CACHED
        if cost.prefix.blocks or cost.session is not None:
            cached = self._prefixes.cached(cost.prefix, tokens, cost.session)
        if pairing.matches is not None:
            matches = list({id(match): match for match in pairing.matches.values()}.values())
            if self._policies[Role.PREFILL].compares:
                pairing = self._cheapest(matches, tokens, now, cached)
            else:
                pairing = self._by_capacity(matches)
        if not pairing.prefills:
            picked = self._pick(
                Role.WORKER, pairing.decodes, tokens, now, pin=pins.decode, wanted=wanted, cached=cached
            )
            return Targets(None, _aggregated_target(*picked, cached))
        picked = self._pick(Role.PREFILL, pairing.prefills, tokens, now, pin=pins.prefill, wanted=wanted, cached=cached)
        prefill = self._prefill_target(*picked, cached)
        decodes = pairing.decodes_of(prefill.endpoint)
        picked = self._pick(Role.DECODE, decodes, tokens, now, pin=pins.decode, wanted=wanted, residue=prefill.residue)
        return Targets(prefill, self._decode_target(*picked))

    def _cheapest(self, matches: Sequence[Match], tokens: float, now: float, cached: CachedTokens[RankLoad]) -> Pairing:
        """Return the match where a request costs least in both roles.

        The prefill target alone does not decide: in a rollout, a group may have much prefill and little decode.
        """
        policy = self._policies
        least, found = math.inf, list[Pairing]()
        for match in matches:
            prefills = policy[Role.PREFILL].within_reach(match.prefills, cached)
            decodes = policy[Role.DECODE].within_reach(match.decodes, NOTHING_CACHED)
            cost = policy[Role.PREFILL].cost(prefills, tokens, now, cached)
            cost += _DECODE_WEIGHT * policy[Role.DECODE].cost(decodes, tokens, now)
            if cost <= least:
                found = [*(found if cost == least else ()), Pairing(prefills, decodes)]
                least = cost
        return found[0] if len(found) == 1 else self._rng.choice(found)

    def _by_capacity(self, matches: Sequence[Match]) -> Pairing:
        """Return a match at random, weighted by the smaller of its shares of all prefill ranks and of all decode ranks.

        Weighted by prefill alone, one decode endpoint would get the requests of all prefill endpoints of its release.
        A decode endpoint in several matches counts in each by the share of their prefill ranks.
        """
        prefills = [sum(len(each.ranks) for each in match.prefills) for match in matches]
        users: Counter[EndpointLoad] = Counter()
        for match, ranks in zip(matches, prefills, strict=True):
            for each in match.decodes:
                users[each] += ranks
        decodes = [
            sum(len(each.ranks) * ranks / users[each] for each in match.decodes)
            for match, ranks in zip(matches, prefills, strict=True)
        ]
        total = sum(prefills), sum(decodes)
        weights = [min(ranks / total[0], others / total[1]) for ranks, others in zip(prefills, decodes, strict=True)]
        match = self._rng.choices(matches, weights)[0]
        return Pairing(match.prefills, match.decodes)

    def _pick(
        self,
        role: Role,
        endpoints: Sequence[EndpointLoad],
        tokens: float,
        now: float,
        *,
        pin: int | None,
        wanted: Wanted | None,
        cached: CachedTokens[RankLoad] = NOTHING_CACHED,
        residue: tuple[int, int] | None = None,
    ) -> tuple[Candidate, RankLoad | None]:
        """Pick an endpoint by the policies of a role, and a rank on it; None leaves the rank to the engine.

        *residue* is the ``(rank, ranks)`` that the bootstrap room leads to on the prefill engine. Where the bootstrap
        room also decides the decode rank, only a rank is picked that the same one can lead to.
        """
        policy = self._policies[role]
        near, by_room = policy.within_reach(endpoints, cached), RankControl.BY_ROOM
        candidates = (
            [each.candidate for each in near]
            if residue is None
            else [
                _reachable(each, residue) if each.capabilities.decode_control is by_room else each.candidate
                for each in near
            ]
        )
        if wanted is not None:
            candidates = [left for each in candidates if (left := each.only(wanted)) is not None] or candidates
        if pin is not None:
            pinned = [left for each in candidates if (left := each.only(lambda rank: rank.index == pin)) is not None]
            if pinned:
                return policy.pick(pinned, tokens, now, cached=cached, pinned=True)
        return policy.pick(candidates, tokens, now, cached=cached)

    def _prefill_target(self, chosen: Candidate, rank: RankLoad | None, cached: CachedTokens[RankLoad]) -> Target:
        endpoint, routed = chosen.endpoint, False
        if rank is not None:
            routed = endpoint.capabilities.takes_routed_rank and endpoint.facts.single_rank is None
        elif endpoint.facts.follows_rooms or endpoint.facts.single_rank is not None:
            rank = self._rng.choice(chosen.ranks)
        else:
            return Target(endpoint, None, routed=False, by_room=False)
        # A routed rank gets a congruent room, too: from 0.5.11 on an engine that follows rooms refuses any other.
        return Target(endpoint, rank.index, routed=routed, by_room=True, cached=_cached_tokens(rank, cached))

    def _decode_target(self, chosen: Candidate, rank: RankLoad | None) -> Target:
        endpoint = chosen.endpoint
        control = endpoint.capabilities.decode_control
        if control is RankControl.BY_ROOM:
            known = self._rng.choice(chosen.ranks) if rank is None else rank
            return Target(endpoint, known.index, routed=False, by_room=True)
        if rank is None or control is RankControl.ENGINE:
            return Target(endpoint, None, routed=False, by_room=False)
        return Target(endpoint, rank.index, routed=endpoint.facts.single_rank is None, by_room=False)


def _aggregated_target(chosen: Candidate, rank: RankLoad | None, cached: CachedTokens[RankLoad]) -> Target:
    if rank is None:
        return Target(chosen.endpoint, None, routed=False, by_room=False)
    return Target(chosen.endpoint, rank.index, routed=True, by_room=False, cached=_cached_tokens(rank, cached))


def _cached_tokens(rank: RankLoad, cached: CachedTokens[RankLoad]) -> float:
    return cached.by_rank.get(rank, cached.elsewhere)


def _reachable(endpoint: EndpointLoad, prefill: tuple[int, int]) -> Candidate:
    """Return a decode endpoint with the ranks that one bootstrap room can lead to together with the prefill rank."""
    left = endpoint.candidate.only(lambda rank: agree(prefill, endpoint.facts.position_of(rank.index)))
    assert left is not None  # noqa: S101 - of any ranks that follow one another, one is congruent
    return left
