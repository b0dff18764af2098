"""Failures of legs: the error that the client gets, who may be blamed, and the budget of retries.

A 4xx of an engine is the client's fault: it passes as the engine wrote it, and no endpoint is blamed.
"""

from enum import IntEnum, auto
from typing import Final

from msgspec import Struct

from dp_extproc.config.reliability import RetrySettings
from dp_extproc.engines.model import Role
from dp_extproc.request.error_shapes import ErrorShape
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.engine_text import no_answer, scrub

ENGINE_FAILED: Final = 500
"""The status from which on a response is a failure of the engine."""
_TEXT_BYTES: Final = 2000
"""Bytes of an engine's text that a client gets within an error of the service."""


class RetryBudget:
    """Bounds retries, so that a storm of failures does not multiply the load.

    Each request adds a part of one retry, and each retry takes one.
    """

    __slots__ = ("_left", "_settings")

    def __init__(self, settings: RetrySettings) -> None:
        self._settings = settings
        self._left = float(settings.burst)

    def earn(self) -> None:
        """Count a request that was scheduled for the first time."""
        self._left = min(self._left + self._settings.budget, self._settings.burst)

    def spend(self, attempts: int) -> bool:
        """Take a retry, if one is left for a request that has failed in so many attempts."""
        if attempts >= self._settings.attempts or self._left < 1:
            return False
        self._left -= 1
        return True


class Blame(IntEnum):
    """How the endpoint at fault is found."""

    NONE = auto()
    BY_TEXT = auto()
    """It is that of the failed leg, unless the engine's text accuses the peer."""
    IF_SILENT = auto()
    """It is each endpoint that may have delayed the leg, and that has served no leg since the pick."""


class Failure(Struct, frozen=True):
    """The reason why an attempt cannot succeed."""

    leg: Role
    reason: Reason
    status: int
    message: str
    text: bytes = b""
    """The engine's own text."""
    blame: Blame = Blame.BY_TEXT

    @property
    def is_clients_fault(self) -> bool:
        return self.reason is Reason.ENGINE_REFUSED

    def body(self, shape: ErrorShape) -> bytes:
        """Write the body of the client's error, in a shape unless it is the engine's own."""
        if self.is_clients_fault and self.text:
            return scrub(self.text)
        if (cause := no_answer(self.text)) is not None:
            message = f"the {self.leg.value} server did not answer: {cause}"
        else:
            text = scrub(self.text[:_TEXT_BYTES]).decode(errors="replace").strip()
            message = f"{self.message}: {text}" if text else self.message
        return Rejection(self.status, self.reason, message).body(shape)


def failed(leg: Role, message: str, text: bytes = b"") -> Failure:
    """Make the failure of a leg by the fault of an endpoint."""
    reason = Reason.PREFILL_FAILED if leg is Role.PREFILL else Reason.DECODE_FAILED
    return Failure(leg, reason, 502, message, text)


def timed_out(leg: Role, message: str) -> Failure:
    """Make the failure of a leg that took too long."""
    reason = Reason.PREFILL_TIMEOUT if leg is Role.PREFILL else Reason.DECODE_TIMEOUT
    return Failure(leg, reason, 504, message, blame=Blame.IF_SILENT)


def engine_error(leg: Role, status: int, text: bytes, message: str) -> Failure:
    """Make the failure that an engine's error of 400 or more means; the message is for one of 500 or more."""
    if status >= ENGINE_FAILED:
        return failed(leg, message, text)
    refused = f"the engine answered {status}"
    return Failure(leg, Reason.ENGINE_REFUSED, status, refused, text, Blame.NONE)
