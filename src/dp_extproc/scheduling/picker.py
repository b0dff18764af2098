"""The targets of a request, picked so that the engines of every release run it on these ranks.

Who decides the rank of an endpoint differs by release: a routing field, the bootstrap room, or the engine. One
bootstrap room serves both legs, so the decode target is picked after the prefill target, from ranks that agree with it.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from msgspec import Struct

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.capabilities import RankControl
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Candidate, EndpointLoad, Target
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


class Pins(Struct, frozen=True):
    """The ranks that the client asked for, where the pool allows that."""

    prefill: int | None = None
    decode: int | None = None


NO_PINS: Final = Pins()

Wanted = Callable[[RankLoad], bool]
"""Whether a rank may be picked."""


class Picker:
    """Picks the targets of the requests of one pool."""

    def __init__(
        self, settings: PolicySettings, signal: LoadSignal, prefixes: PrefixIndex[RankLoad], rng: Random
    ) -> None:
        """Set up.

        Args:
            settings: The policies of the pool.
            signal: Which numbers are the load of a rank.
            prefixes: Which ranks have which prefixes in their cache.
            rng: Source of ties, and of everything that policies leave to chance.
        """
        self._policies = {role: Policy(settings, signal, rng) for role in Role}
        self._prefixes = prefixes
        self._rng = rng

    def pick(
        self,
        pairing: Pairing,
        cost: RequestCost,
        now: float,
        pins: Pins = NO_PINS,
        *,
        wanted: Wanted | None = None,
    ) -> Targets:
        """Pick the targets of a request.

        Args:
            pairing: What to pick from; all endpoints of a role are equally eligible.
            cost: The work that the request is.
            now: The current time, as estimates change with it.
            pins: Ranks that the client asked for; ignored if no endpoint has them.
            wanted: Whether a rank may be picked; ignored for a role if none may. None allows every rank.
        """
        if not pairing.prefills:
            return Targets(None, self._aggregated(pairing.decodes, cost, now, pins.decode, wanted))
        prefill = self._prefill(pairing.prefills, cost, now, pins.prefill, wanted)
        decodes = pairing.decodes_of(prefill.endpoint)
        return Targets(
            prefill, self._decode(decodes, cost.tokens, now, prefill.residue, pin=pins.decode, wanted=wanted)
        )

    def _aggregated(
        self, endpoints: Sequence[EndpointLoad], cost: RequestCost, now: float, pin: int | None, wanted: Wanted | None
    ) -> Target:
        cached = self._cached(cost)
        near = self._policies[Role.WORKER].within_reach(endpoints, cached)
        candidates = _only([endpoint.candidate for endpoint in near], wanted)
        chosen, rank = self._pick(Role.WORKER, candidates, cost.tokens, now, pin=pin, cached=cached)
        index = None if rank is None else rank.index
        return Target(
            chosen.endpoint, index, routed=rank is not None, by_room=False, cached=_cached_tokens(rank, cached)
        )

    def _cached(self, cost: RequestCost) -> CachedTokens[RankLoad]:
        if cost.prefix.blocks or cost.session is not None:
            return self._prefixes.cached(cost.prefix, cost.tokens, cost.session)
        return NOTHING_CACHED

    def _prefill(
        self, endpoints: Sequence[EndpointLoad], cost: RequestCost, now: float, pin: int | None, wanted: Wanted | None
    ) -> Target:
        cached = self._cached(cost)
        near = self._policies[Role.PREFILL].within_reach(endpoints, cached)
        candidates = _only([endpoint.candidate for endpoint in near], wanted)
        chosen, rank = self._pick(Role.PREFILL, candidates, cost.tokens, now, pin=pin, cached=cached)
        endpoint = chosen.endpoint
        if rank is None and (endpoint.facts.follows_rooms or endpoint.facts.single_rank is not None):
            rank = self._rng.choice(chosen.ranks)
            return Target(endpoint, rank.index, routed=False, by_room=True, cached=_cached_tokens(rank, cached))
        # A picked rank gets a congruent room: from 0.5.11 on an engine that follows rooms refuses any other.
        known = rank is not None
        return Target(
            endpoint,
            None if rank is None else rank.index,
            routed=known and endpoint.capabilities.takes_routed_rank and endpoint.facts.single_rank is None,
            by_room=known,
            cached=_cached_tokens(rank, cached),
        )

    def _decode(
        self,
        endpoints: Sequence[EndpointLoad],
        tokens: float,
        now: float,
        prefill: tuple[int, int] | None,
        *,
        pin: int | None,
        wanted: Wanted | None,
    ) -> Target:
        near = self._policies[Role.DECODE].within_reach(endpoints, NOTHING_CACHED)
        by_room = RankControl.BY_ROOM
        reachable = [
            _reachable(each, prefill) if each.capabilities.decode_control is by_room else each.candidate
            for each in near
        ]
        candidates = _only(reachable, wanted)
        chosen, rank = self._pick(Role.DECODE, candidates, tokens, now, pin=pin)
        control = chosen.endpoint.capabilities.decode_control
        if control is RankControl.BY_FIELD:
            index = None if rank is None else rank.index
            routed = rank is not None and chosen.endpoint.facts.single_rank is None
            return Target(chosen.endpoint, index, routed=routed, by_room=False)
        if control is RankControl.BY_ROOM:
            known = self._rng.choice(chosen.ranks) if rank is None else rank
            return Target(chosen.endpoint, known.index, routed=False, by_room=True)
        return Target(chosen.endpoint, None, routed=False, by_room=False)

    def _pick(
        self,
        role: Role,
        candidates: Sequence[Candidate],
        tokens: float,
        now: float,
        *,
        pin: int | None,
        cached: CachedTokens[RankLoad] = NOTHING_CACHED,
    ) -> tuple[Candidate, RankLoad | None]:
        policy = self._policies[role]
        if pin is not None:
            pinned = [left for each in candidates if (left := each.only(lambda rank: rank.index == pin)) is not None]
            if pinned:
                return policy.pick(pinned, tokens, now, cached=cached, pinned=True)
        return policy.pick(candidates, tokens, now, cached=cached)


def _cached_tokens(rank: RankLoad | None, cached: CachedTokens[RankLoad]) -> float:
    return 0.0 if rank is None else cached.by_rank.get(rank, cached.elsewhere)


def _only(candidates: Sequence[Candidate], wanted: Wanted | None) -> Sequence[Candidate]:
    if wanted is None:
        return candidates
    left = [found for each in candidates if (found := each.only(wanted)) is not None]
    return left or candidates


def _reachable(endpoint: EndpointLoad, prefill: tuple[int, int] | None) -> Candidate:
    """Return a decode endpoint with the ranks that one bootstrap room can lead to together with the prefill rank."""
    if prefill is None:
        return endpoint.candidate
    left = endpoint.candidate.only(lambda rank: agree(prefill, endpoint.facts.position_of(rank.index)))
    assert left is not None  # noqa: S101 - of any ranks that follow one another, one is congruent
    return left
