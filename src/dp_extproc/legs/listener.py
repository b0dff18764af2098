"""Who is informed of the legs that the service sends."""

from enum import StrEnum
from typing import Protocol


class LegOutcome(StrEnum):
    """How a leg ended; a label of metrics."""

    ANSWERED = "answered"
    """The engine answered with a status below 400."""
    STATUS = "status"
    """The engine answered with a status of 400 or more."""
    REFUSED = "refused"
    """The engine was not reached."""
    RESET = "reset"
    """The connection broke before the response headers, or within the response."""
    UNREADABLE = "unreadable"
    """The response was no HTTP, or too large."""
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    """It was cancelled before the response headers."""
    DROPPED = "dropped"
    """It was not sent, because too many are under way."""
    UNSEEN = "unseen"
    """The engine computes the leg, but its response is lost."""


class ResendCause(StrEnum):
    """Why a leg was sent again; a label of metrics."""

    REFUSED = "refused"
    """The engine could not be reached."""
    STALE = "stale"
    """A connection that was kept open broke before a byte of the response."""
    UNAVAILABLE = "unavailable"
    """A proxy before the engine answered 502 or 503 in its place."""


class LegListener(Protocol):
    """Is informed of every leg."""

    def leg_sent(self) -> None:
        """A leg starts."""

    def leg_resent(self, cause: ResendCause) -> None:
        """A leg is sent again."""

    def leg_ended(self, outcome: LegOutcome, seconds: float) -> None:
        """A leg has ended, so many seconds after its start."""


class NoLegListener:
    """Takes no notice of legs."""

    def leg_sent(self) -> None:
        """Do nothing."""

    def leg_resent(self, cause: ResendCause) -> None:
        """Do nothing."""

    def leg_ended(self, outcome: LegOutcome, seconds: float) -> None:
        """Do nothing."""
