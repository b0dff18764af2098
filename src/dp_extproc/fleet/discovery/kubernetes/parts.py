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


@dataclass(frozen=True, slots=True)
class Found:
    """The members of all objects."""

    members: tuple[Member, ...]
    problems: tuple[str, ...]


def combine(parts: Collection[Part]) -> Found:
    """Merge the parts of all objects; each URL counts once.

    A Service with both address families has each pod in two slices. IPv4 counts if the Service has IPv4 endpoints, so
    that each pod is one member.
    """
    with_ipv4 = {each.service for each in parts if each.family == "IPv4" and each.members}
    members: dict[str, Member] = {}
    for part in parts:
        if part.family != "IPv6" or part.service not in with_ipv4:
            for member in part.members:
                members.setdefault(member.url, member)
    return Found(tuple(members.values()), tuple(sorted({each.problem for each in parts if each.problem})))
