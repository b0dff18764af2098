"""One attempt to serve a request: what it has on the books, and the four events that move it."""

from collections.abc import Callable
from typing import Final, Protocol

from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.records import PlacementRecord
from dp_extproc.load.step_group import Reservation


class InFlightListener(Protocol):
    """Who wants to know what becomes of attempts. Called on the request path, so each call must be short.

    Attempts are numbered, each once in the life of the process. The moments are in the clock of the placement.
    """

    def dispatched(self, attempt: int, dispatch: PlacementRecord, now: float) -> None:
        """A request was placed. Always the first event of an attempt."""

    def prefill_answered(self, attempt: int, now: float) -> None:
        """The prompt is computed. Never told of one whose prefill has failed."""

    def first_token(self, attempt: int, now: float) -> None:
        """The answer to the client has begun. Never told of an error."""

    def ended(self, attempt: int, now: float) -> None:
        """It is over, for whatever reason. Always the last event of an attempt."""


class _Nobody:
    """Wants to know nothing."""

    def dispatched(self, attempt: int, dispatch: PlacementRecord, now: float) -> None: ...
    def prefill_answered(self, attempt: int, now: float) -> None: ...
    def first_token(self, attempt: int, now: float) -> None: ...
    def ended(self, attempt: int, now: float) -> None: ...


NOBODY: Final[InFlightListener] = _Nobody()

ERROR: Final = 400
"""From this status on an answer is an error."""


def nothing() -> None:
    """Do nothing."""


class InFlight:
    """From the pick until the answer is over.

    The pick itself is the first event; the other three are the methods. Each may come late, repeatedly or not at
    all, in any order: whatever happens, every reservation is released exactly once, at the latest by :meth:`end`.
    """

    __slots__ = (
        "_answered", "_decode", "_made_room", "_observer", "_on_prefill_answer", "_over", "_prefill", "_streaming",
        "decode_endpoint", "first_byte_at", "leg", "number", "picked_at", "prefill_endpoint", "prefill_status",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        picked_at: float,
        prefill: tuple[Reservation, ...],
        decode: tuple[Reservation, ...],
        *,
        prefill_endpoint: EndpointLoad | None = None,
        decode_endpoint: EndpointLoad | None = None,
        leg: str = "",
        streaming: bool = False,
        observer: InFlightListener = NOBODY,
        on_prefill_answer: Callable[[int], None] | None = None,
        made_room: Callable[[], None] = nothing,
    ) -> None:
        self.number = number
        self.leg = leg
        """Token by which the prefill leg's own ext_proc stream finds this attempt."""
        self.prefill_endpoint = prefill_endpoint
        self.decode_endpoint = decode_endpoint
        """Who answers the client; a server that does both, too."""
        self.picked_at = picked_at
        self.prefill_status: int | None = None
        self.first_byte_at: float | None = None
        self._prefill = prefill
        self._decode = decode
        self._streaming = streaming
        """Whether the head of the answer may come before any of it is computed."""
        self._observer = observer
        self._on_prefill_answer = on_prefill_answer
        self._made_room = made_room
        self._answered = False
        self._over = False

    def prefill_answered(self, status: int, now: float) -> None:
        """Note that the prefill leg is over: its engine has answered, or Envoy in its place."""
        if self.prefill_status is None and not self._over:
            self.prefill_status = status
            if self._on_prefill_answer is not None:
                self._on_prefill_answer(status)
            if status >= ERROR:  # nothing was computed; what follows of it, others learn from the end
                for reservation in self._prefill:
                    reservation.withdraw(now)
                self._made_room()
                return
            self._observer.prefill_answered(self.number, now)
            if self.prefill_endpoint is not None:
                self.prefill_endpoint.answered_at = now
            for reservation in self._prefill:
                reservation.release(now)
            for reservation in self._decode:
                reservation.started(now)  # the KV cache is there, so decoding begins
            self._made_room()

    def first_byte(self, status: int, now: float) -> None:
        """Note that the response headers have come from the server that answers the client."""
        if self.first_byte_at is None and not self._over:
            self.first_byte_at = now
            self._answered = status < ERROR
            if self._answered:
                self._observer.first_token(self.number, now)
                if self.decode_endpoint is not None:
                    self.decode_endpoint.answered_at = now
                for reservation in self._decode:
                    reservation.started(now)
            # One server does both; and a whole answer tells that its prompt was computed, whoever did it.
            if not self._prefill or (status < ERROR and not self._streaming):
                self.prefill_answered(status, now)

    def end(self, now: float) -> None:
        """Note that the response is over, for whatever reason.

        If prefill has not answered until then, the client has left, or a leg has failed: no step has ended by it.
        """
        if not self._over:
            self._over = True
            self._observer.ended(self.number, now)
            for reservation in self._prefill:
                reservation.withdraw(now)
            for reservation in self._decode:
                if self._answered:
                    reservation.release(now)
                else:  # how long it lasted tells nothing of the server's pace
                    reservation.withdraw(now)
            self._made_room()
