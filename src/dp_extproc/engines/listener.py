"""What the scraper tells the rest of the service. Pure: the load cache and the telemetry implement it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Protocol

from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage


class FailureKind(StrEnum):
    """Why an endpoint could not be read, or not wholly."""

    UNRESOLVABLE = "unresolvable"
    """Its host name has no address."""
    REFUSED = "refused"
    """No connection: nobody listens, or there is no way to the host."""
    TIMEOUT = "timeout"
    """No complete answer in time."""
    HTTP_STATUS = "http_status"
    """It answered with another status than 200."""
    TOO_LARGE = "too_large"
    """The answer exceeds ``load.max_page_bytes``."""
    UNREADABLE = "unreadable"
    """The answer is not what its format demands: cut off, not HTTP, not JSON, not Prometheus text."""
    WRONG_SHAPE = "wrong_shape"
    """Well-formed, but not the page that SGLang prints."""
    DISAGREEMENT = "disagreement"
    """Configuration, /server_info and load page tell different roles or numbers of DP ranks."""
    INTERNAL = "internal"
    """This service itself has failed over what the engine told."""


GONE: Final = frozenset({FailureKind.REFUSED, FailureKind.UNRESOLVABLE})
"""Nobody is there."""
AWAY: Final = GONE | {FailureKind.TIMEOUT}
"""After these an engine may come back as another: restarted with other arguments, or upgraded."""


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """One thing that is wrong with an endpoint."""

    kind: FailureKind
    message: str
    """What happened and, where there is one, the remedy."""
    page_was_read: bool = False
    """Whether the load page was read in the same round all the same: the engine is there."""

    @property
    def is_away(self) -> bool:
        """Whether the engine could not be reached, so that it may come back as another process."""
        return not self.page_was_read and self.kind in AWAY


def unexpected(error: Exception) -> EngineFailure:
    """Tell that it is this service that has failed."""
    message = f"dp-extproc itself failed over what the engine told ({type(error).__name__}); see the log"
    return EngineFailure(FailureKind.INTERNAL, message)


class EngineListener(Protocol):
    """Who wants to know. Called from the event loop, so each call must be short. Times are monotonic seconds."""

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Learn who an engine is; told first, after each recovery, and every minute.

        Args:
            endpoint: As configured.
            address: ``IP:port``, IPv6 in brackets.
            facts: What the engine says of itself.
            now: When its answer was complete.
        """

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Learn an engine's load.

        Args:
            endpoint: As configured.
            page: Holds only ranks that the server has.
            started: When the request for the page was sent.
            now: When its answer was complete.
        """

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Learn what is wrong; told in every round in which it is so, after :meth:`sampled` if there was a sample."""


class EngineListeners:
    """Several listeners as one. An exception that one of them raises concerns neither the others nor the emitter."""

    def __init__(self, listeners: tuple[EngineListener, ...], report: Callable[[Endpoint, Exception], None]) -> None:
        """Start.

        Args:
            listeners: Called in this order.
            report: Called with what a listener raises, and the endpoint of the event.
        """
        self._listeners = listeners
        self._report = report

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Pass the event on. If a listener raises, all are told that the endpoint has failed."""
        self._emit(endpoint, now, lambda each: each.discovered(endpoint, address, facts, now))

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Pass the event on. If a listener raises, all are told that the endpoint has failed."""
        self._emit(endpoint, now, lambda each: each.sampled(endpoint, page, started, now))

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Pass the event on."""
        self._call(endpoint, lambda each: each.failed(endpoint, failure, now))

    def _emit(self, endpoint: Endpoint, now: float, event: Callable[[EngineListener], None]) -> None:
        if (error := self._call(endpoint, event)) is not None:
            self.failed(endpoint, replace(unexpected(error), page_was_read=True), now)

    def _call(self, endpoint: Endpoint, event: Callable[[EngineListener], None]) -> Exception | None:
        first = None
        for listener in self._listeners:
            try:
                event(listener)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other listeners get the event
                self._report(endpoint, error)
                first = first or error
        return first
