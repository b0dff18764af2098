"""The prefill and the decode side of an attempt, picked so that every engine version agrees on the ranks."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from msgspec import Struct

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.capabilities import RankControl
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Candidate, EndpointLoad, Target
from dp_extproc.load.rank import RankLoad
from dp_extproc.load.records import RequestCost
from dp_extproc.prefix_cache.index import Held, PrefixIndex
from dp_extproc.scheduling.bootstrap_room import agree, draw_room
from dp_extproc.scheduling.policies import NOTHING_HELD, Policy


class Pair(Struct, frozen=True):
    """Both sides."""

    prefill: Target
    decode: Target

    def draw_room(self, rng: Random) -> int:
        """Draw a new room under which both servers find the ranks of this pair."""
        return draw_room(rng, self.prefill.residue, self.decode.residue)


class Pins(Struct, frozen=True):
    """Ranks that the client asked for and may ask for."""

    prefill: int | None = None
    decode: int | None = None


NO_PINS: Final = Pins()

Wanted = Callable[[RankLoad], bool]
"""Tells whether a rank may be picked."""


class Picker:
    """Picks the servers and ranks of one pool."""

    def __init__(
        self, settings: PolicySettings, signal: LoadSignal, prefixes: PrefixIndex[RankLoad], rng: Random
    ) -> None:
        """Set up.

        Args:
            settings: The pool's policies.
            signal: What the tokens of a rank are.
            prefixes: Which ranks hold what prompts begin with.
            rng: For ties and whatever else is left to chance.
        """
        self._policies = {role: Policy(settings, signal, rng) for role in Role}
        self._prefixes = prefixes
        self._rng = rng

    def worker(
        self,
        hosts: Sequence[EndpointLoad],
        demand: RequestCost,
        now: float,
        pin: int | None = None,
        *,
        wanted: Wanted | None = None,
    ) -> Target:
        """Pick a server that does both prefill and decode, and its rank.

        Args:
            hosts: At least one, equally eligible.
            demand: What the request asks for.
            now: For what changes with time alone.
            pin: A rank that the client asked for; passed over when no host has it.
            wanted: Which ranks are picked from, if any host has one; None for all.
        """
        held = self._held(demand)
        near = self._policies[Role.WORKER].within_reach(hosts, held)
        chosen, rank = self._pick(
            Role.WORKER, _only([host.candidate for host in near], wanted), demand.tokens, now, pin=pin, held=held
        )
        index = None if rank is None else rank.index
        return Target(chosen.endpoint, index, routed=rank is not None, by_room=False, cached=_cached(rank, held))

    def pair(
        self,
        prefills: Sequence[EndpointLoad],
        decodes: Sequence[EndpointLoad],
        demand: RequestCost,
        now: float,
        pins: Pins = NO_PINS,
        *,
        wanted: Wanted | None = None,
        decodes_of: Callable[[EndpointLoad], Sequence[EndpointLoad]] | None = None,
    ) -> Pair:
        """Pick both sides of a disaggregated request.

        Args:
            prefills: At least one, equally eligible.
            decodes: Likewise.
            demand: What the request asks for.
            now: For what changes with time alone.
            pins: Ranks that the client asked for; passed over when no host has them.
            wanted: Which ranks are picked from, on either side, if any host has one; None for all.
            decodes_of: Gives those decode servers, at least one, that a prefill server can be paired with; None if all
                can be with all.
        """
        prefill = self._prefill(prefills, demand, now, pins.prefill, wanted)
        if decodes_of is not None:
            decodes = decodes_of(prefill.endpoint)
        return Pair(prefill, self._decode(decodes, demand.tokens, now, prefill.residue, pin=pins.decode, wanted=wanted))

    def _held(self, demand: RequestCost) -> Held[RankLoad]:
        if demand.prefix.blocks or demand.session is not None:
            return self._prefixes.held(demand.prefix, demand.tokens, demand.session)
        return NOTHING_HELD

    def _prefill(
        self, hosts: Sequence[EndpointLoad], demand: RequestCost, now: float, pin: int | None, wanted: Wanted | None
    ) -> Target:
        held = self._held(demand)
        near = self._policies[Role.PREFILL].within_reach(hosts, held)
        candidates = _only([host.candidate for host in near], wanted)
        chosen, rank = self._pick(Role.PREFILL, candidates, demand.tokens, now, pin=pin, held=held)
        host = chosen.endpoint
        if rank is None and (host.facts.follows_rooms or host.facts.single_rank is not None):
            rank = self._rng.choice(chosen.ranks)
            return Target(host, rank.index, routed=False, by_room=True, cached=_cached(rank, held))
        # A chosen rank gets a congruent room: from 0.5.11 on a server that follows rooms refuses any other.
        known = rank is not None
        return Target(
            host,
            None if rank is None else rank.index,
            routed=known and host.capabilities.takes_routed_rank and host.facts.single_rank is None,
            by_room=known,
            cached=_cached(rank, held),
        )

    def _decode(
        self,
        hosts: Sequence[EndpointLoad],
        tokens: float,
        now: float,
        prefill: tuple[int, int] | None,
        *,
        pin: int | None,
        wanted: Wanted | None,
    ) -> Target:
        near = self._policies[Role.DECODE].within_reach(hosts, NOTHING_HELD)
        by_room = RankControl.BY_ROOM
        reachable = [
            _reachable(host, prefill) if host.capabilities.decode_control is by_room else host.candidate
            for host in near
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
        held: Held[RankLoad] = NOTHING_HELD,
    ) -> tuple[Candidate, RankLoad | None]:
        policy = self._policies[role]
        if pin is not None:
            pinned = [left for each in candidates if (left := each.only(lambda rank: rank.index == pin)) is not None]
            if pinned:
                return policy.pick(pinned, tokens, now, held=held, pinned=True)
        return policy.pick(candidates, tokens, now, held=held)


def _cached(rank: RankLoad | None, held: Held[RankLoad]) -> float:
    return 0.0 if rank is None else held.by_slot.get(rank, held.elsewhere)


def _only(candidates: Sequence[Candidate], wanted: Wanted | None) -> Sequence[Candidate]:
    if wanted is None:
        return candidates
    left = [found for each in candidates if (found := each.only(wanted)) is not None]
    return left or candidates


def _reachable(host: EndpointLoad, prefill: tuple[int, int] | None) -> Candidate:
    """Give a decode server with the ranks that one room can lead to together with the prefill rank."""
    if prefill is None:
        return host.candidate
    left = host.candidate.only(lambda rank: agree(prefill, host.facts.position_of(rank.index)))
    assert left is not None  # noqa: S101 - of any ranks that follow one another, one is congruent
    return left
