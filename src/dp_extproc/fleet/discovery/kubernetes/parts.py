"""What single objects contribute to the members of a role, and the members of all of them. Pure."""

from collections.abc import Collection
from dataclasses import dataclass

from dp_extproc.fleet.discovery.source import Member


@dataclass(frozen=True, slots=True)
class Part:
    """The members of one object."""

    members: tuple[Member, ...] = ()
    problem: str = ""
    """Why members of the object are left out, and what to do; empty if none is."""
    service: str = ""
    """Service of a slice."""
    family: str = ""
    """Address family of a slice, ``IPv4`` or ``IPv6``; empty for a pod, which has one address here."""

    @property
    def size(self) -> int:
        """Objects and members that were read."""
        return 1 + len(self.members)


@dataclass(frozen=True, slots=True)
class Found:
    """The members of all objects."""

    members: tuple[Member, ...]
    problems: tuple[str, ...]


def combine(parts: Collection[Part]) -> Found:
    """Merge the parts of all objects.

    A Service with both address families has each pod in two slices. IPv4 counts if the Service has IPv4 endpoints, so
    that each pod is one member. A URL may be listed twice: for a moment a pod may be in two slices, or an old and a new
    pod may have one address.
    """
    with_ipv4 = {each.service for each in parts if each.family == "IPv4" and each.members}
    counting = (each for each in parts if each.family != "IPv6" or each.service not in with_ipv4)
    members = tuple(member for part in counting for member in part.members)
    return Found(members, tuple(sorted({each.problem for each in parts if each.problem})))
