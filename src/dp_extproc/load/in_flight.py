"""One in-flight request: its reservations, and the four events that move and end them."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Final, Protocol

from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.records import PlacementRecord
from dp_extproc.load.step_group import Reservation


class InFlightListener(Protocol):
    """What is called at each event of this replica's requests. The calls are on the request path and must be short.

    A number is given once in the life of the process. Times are of the clock that the load cache is fed with.
    """

    def opened(self, number: int, record: PlacementRecord, now: float) -> None:
        """Note that a request was placed. It is the first event of a request."""

    def prefill_answered(self, number: int, now: float) -> None:
        """Note that the prompt is computed. It is not called if prefill has failed."""

    def first_token(self, number: int, now: float) -> None:
        """Note that the response to the client has begun. It is not called for an error."""

    def ended(self, number: int, now: float) -> None:
        """Note that the request is over, for whatever reason. It is the last event of a request."""


class _NoListener:
    def opened(self, number: int, record: PlacementRecord, now: float) -> None: ...
    def prefill_answered(self, number: int, now: float) -> None: ...
    def first_token(self, number: int, now: float) -> None: ...
    def ended(self, number: int, now: float) -> None: ...


NO_LISTENER: Final[InFlightListener] = _NoListener()
OK: Final = 200
ERROR: Final = 400
"""The HTTP status from which on a response is an error."""


def nothing() -> None:
    """Do nothing."""


@dataclass(slots=True, eq=False, repr=False)
class InFlight:
    """A request from the pick until its response is over.

    The pick is the first event; the other three are the methods. Each may come late, repeatedly or not at all, and in
    any order. Every reservation is ended exactly once, at the latest by :meth:`end`.
    """

    number: int
    picked_at: float
    prefill: tuple[Reservation, ...]
    decode: tuple[Reservation, ...]
    """Reservations of the endpoint that answers the client: of decode, or an aggregated one."""
    _: KW_ONLY
    prefill_endpoint: EndpointLoad | None = None
    decode_endpoint: EndpointLoad | None = None
    leg: str = ""
    """Token by which the ext_proc stream of the prefill leg finds this request; empty if no leg is reported."""
    streaming: bool = False
    """Whether the response headers may come before any token is computed."""
    expected_prefill: float = 0.0
    """Seconds until the prompt is computed, by the measured speed of the engine; 0 if that is unknown."""
    listener: InFlightListener = NO_LISTENER
    on_prefill_answer: Callable[[int], None] | None = None
    """Called with the status when the prefill leg is over."""
    made_room: Callable[[], None] = nothing
    prefill_status: int | None = field(default=None, init=False)
    first_byte_at: float | None = field(default=None, init=False)
    _has_answered: bool = field(default=False, init=False)
    _is_over: bool = field(default=False, init=False)

    @property
    def _is_whole(self) -> bool:
        """Whether a response has come that engines send only once all of it is computed."""
        return self._has_answered and not self.streaming

    def prefill_answered(self, status: int, now: float) -> None:
        """Note that the prefill leg is over: its engine has responded, or Envoy in its place."""
        if self.prefill_status is None and not self._is_over:
            self.prefill_status = status
            if self.on_prefill_answer is not None:
                self.on_prefill_answer(status)
            if status >= ERROR:  # nothing was computed; peers learn what follows from the end
                for reservation in self.prefill:
                    reservation.cancel(now)
                self.made_room()
                return
            self.listener.prefill_answered(self.number, now)
            if self.prefill_endpoint is not None:
                self.prefill_endpoint.answered_at = now
            for reservation in self.prefill:
                reservation.complete(now)
            for reservation in self.decode:
                reservation.first_token(now)  # the KV cache has arrived, so decoding begins
            self.made_room()

    def first_byte(self, status: int, now: float) -> None:
        """Note that the response headers have come from the endpoint that answers the client."""
        if self.first_byte_at is None and not self._is_over:
            self.first_byte_at = now
            self._has_answered = status < ERROR
            if self._has_answered:
                self.listener.first_token(self.number, now)
                if self.decode_endpoint is not None:
                    self.decode_endpoint.answered_at = now
                for reservation in self.decode:
                    reservation.first_token(now)
            # An aggregated endpoint computes the prompt itself. And a whole response is evidence of a computed prompt.
            # Where the prefill leg is reported, its own response is the more exact evidence.
            if not self.prefill or (self._is_whole and not self.leg):
                self.prefill_answered(status, now)

    def end(self, now: float) -> None:
        """Note that the response is over, for whatever reason.

        If prefill has not responded until then, the client has left or a leg has failed, and no step has ended by it.
        But if a whole response has come, only the report of the prefill leg was lost.
        """
        if not self._is_over:
            if self._is_whole:
                self.prefill_answered(OK, now)
            self._is_over = True
            self.listener.ended(self.number, now)
            for reservation in self.prefill:
                reservation.cancel(now)
            for reservation in self.decode:
                if self._has_answered:
                    reservation.complete(now)
                else:  # its duration is no evidence of the engine's TPOT
                    reservation.cancel(now)
            self.made_room()
