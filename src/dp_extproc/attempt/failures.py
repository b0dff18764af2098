"""Failures of legs: the error that the client gets, who may be blamed, and the budget of retries.

A 4xx of an engine is the client's fault: it passes without what the router has added, and no endpoint is
blamed. A 5xx that two
engines answer alike is the fault of the request, too: it is not tried a third time, and no endpoint is blamed.
"""

import re
from enum import IntEnum, auto
from typing import Final

from msgspec import Struct
from msgspec.structs import replace
from xxhash import xxh3_64

from dp_extproc.attempt.error_text import write_error
from dp_extproc.config.reliability import RetrySettings
from dp_extproc.engines.model import Role
from dp_extproc.engines.refusals import WrongRank, wrong_rank
from dp_extproc.request.error_shapes import ErrorShape
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.engine_text import no_answer, scrub

ENGINE_FAILED: Final = 500
"""The status from which on a response is a failure of the engine."""
NO_OTHER_ATTEMPT: Final = Rejection(
    502,
    Reason.DECODE_FAILED,
    "the decode server's connection was cut before its answer had begun, and there is no other attempt",
)
_WRONG_RANK: Final = "the server has not the DP rank that it reported to have"
_TEXT_BYTES: Final = 2000
"""Bytes of an engine's text that a client gets within an error of the service."""
_UNAVAILABLE: Final = frozenset({502, 503, 504})
"""Statuses by which an engine, or a proxy before it, reports a state of the fleet and nothing of the request."""
_OF_THE_PAIR: Final = re.compile(
    rb"KVTransferError|KVPoll|handshake|bootstrap|prefill instance|decode instance", re.IGNORECASE
)
"""Texts of errors between two engines, which may be alike whatever the request is."""
_LOST: Final = b"reset reason: connection termination"
"""Envoy's text for a connection that was closed after the request had been sent on it."""
_VARYING: Final = re.compile(rb"(?<![0-9a-fA-F])[a-fA-F]*+[0-9][0-9a-fA-F]*+")
"""Numbers, ids and addresses, by which errors alike differ between engines."""
_SIGNED_BYTES: Final = 4096
"""Bytes at the beginning of an error's text by which it is compared."""


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
    OUTDATED = auto()
    """None: the facts of the failed leg's endpoint are out of date."""
    INACTIVE = auto()
    """It is the rank of the failed leg, which its engine does not use at present."""


class Failure(Struct, frozen=True):
    """The reason why an attempt cannot succeed."""

    leg: Role
    reason: Reason
    status: int
    message: str
    text: bytes = b""
    """The engine's own text."""
    blame: Blame = Blame.BY_TEXT
    is_lost: bool = False
    """Whether the engine has dropped the connection after it had accepted the request."""
    signature: str = ""
    """What errors of engines alike have in common; empty if this is none that the request itself may have caused."""

    @property
    def is_clients_fault(self) -> bool:
        return self.reason in {Reason.ENGINE_REFUSED, Reason.ABORTED}

    def body(self, shape: ErrorShape) -> bytes:
        """Write the body of the client's error, in a shape unless it is the engine's own."""
        if self.is_clients_fault and self.text:
            return write_error(self.text, self.status, shape)
        if (cause := no_answer(self.text)) is not None:
            message = f"the {self.leg.value} server did not answer: {cause}"
        else:
            text = scrub(self.text[:_TEXT_BYTES]).decode(errors="replace").strip()
            message = f"{self.message}: {text}" if text else self.message
        return Rejection(self.status, self.reason, message).body(shape)


ABORTED: Final = Failure(
    Role.DECODE, Reason.ABORTED, 400, "the request was ended by an /abort_request with its rid", blame=Blame.NONE
)
"""The failure of a request that its client has ended, whatever its engines make of that."""


def failed(leg: Role, message: str, text: bytes = b"", *, status: int = 0, is_lost: bool = False) -> Failure:
    """Make the failure of a leg by the fault of an endpoint; *status* is that of its response, if there is one."""
    reason = Reason.PREFILL_FAILED if leg is Role.PREFILL else Reason.DECODE_FAILED
    is_lost = is_lost or _LOST in text
    return Failure(leg, reason, 502, message, text, is_lost=is_lost, signature=_signature(status, text))


def timed_out(leg: Role, message: str) -> Failure:
    """Make the failure of a leg that took too long."""
    reason = Reason.PREFILL_TIMEOUT if leg is Role.PREFILL else Reason.DECODE_TIMEOUT
    return Failure(leg, reason, 504, message, blame=Blame.IF_SILENT)


def engine_error(leg: Role, status: int, text: bytes, message: str, *, is_lost: bool = False) -> Failure:
    """Make the failure that an engine's error of 400 or more means; the message is for one of 500 or more."""
    if (why := wrong_rank(text)) is not None:  # by our fault, so neither text nor status are for the client
        # Up to 0.5.19 a client's own chat template chooses the text of a 400, and must not take ranks out of service.
        is_inactive = why is WrongRank.INACTIVE and status >= ENGINE_FAILED
        blame = Blame.INACTIVE if is_inactive else Blame.OUTDATED
        return replace(failed(leg, _WRONG_RANK), blame=blame)
    if status >= ENGINE_FAILED:
        return failed(leg, message, text, status=status, is_lost=is_lost)
    refused = message or f"the engine answered {status}"
    return Failure(leg, Reason.ENGINE_REFUSED, status, refused, text, Blame.NONE)


def _signature(status: int, text: bytes) -> str:
    """Return what an error has in common with one of another engine for the same cause."""
    if status < ENGINE_FAILED or status in _UNAVAILABLE or _OF_THE_PAIR.search(text) is not None:
        return ""
    return f"{status}-{xxh3_64(_VARYING.sub(b'#', text[:_SIGNED_BYTES].strip())).hexdigest()}"
