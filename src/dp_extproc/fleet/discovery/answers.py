"""What a look-up of a name gives, whichever resolver makes it. Pure."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One address of a name."""

    host: str
    """IPv4, or IPv6 without brackets."""
    port: int
    name: str = ""
    """The name that an SRV record gives the engine."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All addresses of a name at present. A name that does not exist has none."""

    addresses: tuple[Address, ...] = ()
    ttl: float | None = None
    """Seconds for which the answer is valid; None if it is unknown."""


class LookUpError(Exception):
    """The addresses of a name are unknown at present. The message has the reason."""


class Resolver(Protocol):
    """Looks up one name."""

    async def look_up(self) -> Answer:
        """Give all present addresses, or raise :class:`LookUpError`. The caller limits the time."""
