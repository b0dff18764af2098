"""The events of an engine (facts, load, failure), why it cannot be read, and who listens. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Protocol

from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage


class FailureKind(StrEnum):
    """Why an endpoint could not be read, or only in part."""

    UNRESOLVABLE = "unresolvable"
    """Its host name has no address."""
    REFUSED = "refused"
    """No connection: nothing listens there."""
    UNREACHABLE = "unreachable"
    """No connection for another reason: there is no route to the address."""
    TLS = "tls"
    """Something listens, but there is no agreement about TLS or its certificates."""
    TIMEOUT = "timeout"
    """There was no complete answer in time."""
    HTTP_STATUS = "http_status"
    """The engine answered with a status other than 200."""
    TOO_LARGE = "too_large"
    """The answer exceeds ``load.max_page_bytes``."""
    UNREADABLE = "unreadable"
    """The answer is malformed: cut off, not HTTP, not JSON, not Prometheus text."""
    WRONG_SHAPE = "wrong_shape"
    """The answer is well-formed, but not the page that the engine is expected to print."""
    NOT_READY = "not_ready"
    """The engine reports that it takes no requests: it starts, it is paused, or it shuts down."""
    DISAGREEMENT = "disagreement"
    """Configuration, facts and load page differ in the role or in the number of DP ranks."""
    CHANGED = "changed"
    """Another engine may be at the address: what was reported contradicts the facts, which are read anew."""
    INTERNAL = "internal"
    """The service itself failed on what the engine reported."""


GONE: Final = frozenset({FailureKind.REFUSED, FailureKind.UNREACHABLE, FailureKind.UNRESOLVABLE})
"""Nothing listens at the endpoint."""
AWAY: Final = GONE | {FailureKind.TIMEOUT, FailureKind.TLS}
"""After these the engine may be another one: restarted with other arguments, or upgraded."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """One failure of an endpoint."""

    kind: FailureKind
    message: str
    """What happened and, if there is one, the remedy."""
    page_was_read: bool = False
    """Whether the engine was read in the same round nevertheless. The event then follows that of the read."""
    is_doubt: bool = False
    """Whether the engine is to get no request, while there are others, until its facts were read again."""

    @property
    def is_away(self) -> bool:
        """Whether the engine could not be reached, so that the next one to answer may be another process."""
        return not self.page_was_read and self.kind in AWAY


def internal_failure(error: Exception) -> EngineFailure:
    message = f"dp-extproc itself failed over what the engine told ({type(error).__name__}); see the log"
    return EngineFailure(FailureKind.INTERNAL, message)


class EngineListener(Protocol):
    """Gets engine events. Calls are made in the event loop, so each must be short.

    Times are monotonic seconds: *started* is when the page was requested, and *now* when the answer was complete.
    """

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Take the facts of the engine at ``IP:port``, which is ready.

        This is its first event. It is repeated each minute, and when the engine is ready again.
        """

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Take the load of an engine. The page has only ranks that the engine has."""

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Take a failure. It comes in every round of its duration, after :meth:`sampled` if there was a sample."""


class EngineWatch(Protocol):
    """Takes what requests show of engines, and reads their facts anew. Calls are made on the request path."""

    def suspect(self, url: str) -> None:
        """Read the facts of an engine soon, because a leg has failed there."""

    def contradicted(self, url: str, why: str) -> None:
        """Read the facts of an engine before it gets another request, as it answered one as another engine would."""


class EngineListeners:
    """Several listeners as one, called in order. An exception in one reaches neither the others nor the emitter.

    It goes to *report*, and an event that raises it is followed by a failure of the endpoint, for all listeners.
    """

    def __init__(self, listeners: tuple[EngineListener, ...], report: Callable[[Endpoint, Exception], None]) -> None:
        self._listeners = listeners
        self._report = report

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        self._emit(endpoint, now, lambda each: each.discovered(endpoint, address, facts, now))

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        self._emit(endpoint, now, lambda each: each.sampled(endpoint, page, started, now))

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        self._call(endpoint, lambda each: each.failed(endpoint, failure, now))

    def _emit(self, endpoint: Endpoint, now: float, event: Callable[[EngineListener], None]) -> None:
        if (error := self._call(endpoint, event)) is not None:
            self.failed(endpoint, replace(internal_failure(error), page_was_read=True), now)

    def _call(self, endpoint: Endpoint, event: Callable[[EngineListener], None]) -> Exception | None:
        first = None
        for listener in self._listeners:
            try:
                event(listener)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other listeners get the event
                self._report(endpoint, error)
                first = first or error
        return first
