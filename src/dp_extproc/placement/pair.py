"""The prefill and the decode side of an attempt, picked so that every engine version agrees on the ranks."""

from collections.abc import Sequence
from random import Random

from msgspec import Struct

from dp_extproc.config.schema import PolicySettings, RankPolicy
from dp_extproc.fleet.endpoint import Role
from dp_extproc.fleet.recipe import RankControl
from dp_extproc.placement.load import Candidate, HostLoad
from dp_extproc.placement.policy import Turn, pick
from dp_extproc.placement.room import agree, draw_room


class Side(Struct, frozen=True):
    """One leg's server."""

    host: HostLoad
    rank: int | None
    """The rank that will serve; None when the engine chooses and nobody outside can know."""
    routed: bool
    """Whether the body names the rank. If not, the room leads to it, or the engine chooses."""
    by_room: bool
    """Whether the room must lead to the rank."""

    @property
    def residue(self) -> tuple[int, int] | None:
        """``(rank, ranks)`` for the room."""
        return (self.rank, len(self.host.ranks)) if self.by_room and self.rank is not None else None


class Pair(Struct, frozen=True):
    """Both sides."""

    prefill: Side
    decode: Side

    def draw_room(self, rng: Random) -> int:
        """Draw a new room under which both servers find the ranks of this pair."""
        return draw_room(rng, self.prefill.residue, self.decode.residue)


class Pins(Struct, frozen=True):
    """Ranks that the client asked for and may ask for."""

    prefill: int | None = None
    decode: int | None = None


class Picker:
    """Picks the servers and ranks of one pool."""

    def __init__(self, policy: PolicySettings, rng: Random) -> None:
        self._policy = policy
        self._rng = rng
        self._turns = {role: Turn() for role in Role}

    def worker(self, hosts: Sequence[HostLoad], pin: int | None) -> Side:
        """Pick a server that does both prefill and decode, and its rank.

        Args:
            hosts: At least one, equally eligible.
            pin: A rank that the client asked for; passed over when no host has it.
        """
        chosen, rank = self._pick(Role.WORKER, [host.candidate for host in hosts], pin)
        return Side(chosen.host, rank, routed=rank is not None, by_room=False)

    def pair(self, prefills: Sequence[HostLoad], decodes: Sequence[HostLoad], pins: Pins) -> Pair:
        """Pick both sides of a disaggregated request.

        Args:
            prefills: At least one, equally eligible.
            decodes: Likewise.
            pins: Ranks that the client asked for; passed over when no host has them.
        """
        prefill = self._prefill(prefills, pins.prefill)
        return Pair(prefill, self._decode(decodes, prefill.residue, pins.decode))

    def _prefill(self, hosts: Sequence[HostLoad], pin: int | None) -> Side:
        chosen, rank = self._pick(Role.PREFILL, [host.candidate for host in hosts], pin)
        host = chosen.host
        if rank is None and host.facts.follows_rooms:
            return Side(host, self._rng.choice(chosen.ranks).index, routed=False, by_room=True)
        # A chosen rank gets a congruent room: from 0.5.11 on a server that follows rooms refuses any other.
        known = rank is not None
        return Side(host, rank, routed=known and host.capabilities.carries_routed_rank, by_room=known)

    def _decode(self, hosts: Sequence[HostLoad], prefill: tuple[int, int] | None, pin: int | None) -> Side:
        chosen, rank = self._pick(Role.DECODE, [_reachable(host, prefill) for host in hosts], pin)
        control = chosen.host.capabilities.decode_control
        if control is RankControl.BY_FIELD:
            return Side(chosen.host, rank, routed=rank is not None, by_room=False)
        if control is RankControl.BY_ROOM:
            known = self._rng.choice(chosen.ranks).index if rank is None else rank
            return Side(chosen.host, known, routed=False, by_room=True)
        return Side(chosen.host, None, routed=False, by_room=False)

    def _pick(self, role: Role, candidates: Sequence[Candidate], pin: int | None) -> tuple[Candidate, int | None]:
        if pin is not None:
            pinned = [
                Candidate(candidate.host, ranks)
                for candidate in candidates
                if (ranks := [rank for rank in candidate.ranks if rank.index == pin])
            ]
            if pinned:
                return pick(pinned, self._policy.host, RankPolicy.MINIMUM_TOKENS, self._rng, self._turns[role])
        return pick(candidates, self._policy.host, self._policy.dp_rank, self._rng, self._turns[role])


def _reachable(host: HostLoad, prefill: tuple[int, int] | None) -> Candidate:
    """Give a decode server with the ranks that one room can lead to together with the prefill rank."""
    if prefill is None or host.capabilities.decode_control is not RankControl.BY_ROOM:
        return host.candidate
    ranks = len(host.ranks)
    return Candidate(host, [rank for rank in host.ranks if agree(prefill, (rank.index, ranks))])
