"""One attempt to serve a request: what it has on the books, and the four events that move it."""

from collections.abc import Callable

from dp_extproc.placement.load import Reservation


class Attempt:
    """From the pick until the answer is over.

    The pick itself is the first event; the other three are the methods. Each may come late, repeatedly or not at
    all, in any order: whatever happens, every reservation is released exactly once, at the latest by :meth:`end`.
    """

    __slots__ = ("_decode", "_on_prefill_answer", "_prefill", "first_byte_at", "leg", "picked_at", "prefill_status")

    def __init__(
        self,
        leg: str,
        picked_at: float,
        prefill: tuple[Reservation, ...],
        decode: tuple[Reservation, ...],
        on_prefill_answer: Callable[[int], None],
    ) -> None:
        self.leg = leg
        """Token by which the prefill leg's own ext_proc stream finds this attempt."""
        self.picked_at = picked_at
        self.prefill_status: int | None = None
        self.first_byte_at: float | None = None
        self._prefill = prefill
        self._decode = decode
        self._on_prefill_answer = on_prefill_answer

    def prefill_answered(self, status: int, now: float) -> None:
        """Note that the prefill leg is over: its engine has answered, or Envoy in its place."""
        if self.prefill_status is None:
            self.prefill_status = status
            self._on_prefill_answer(status)
        _release(self._prefill, now)

    def first_byte(self, status: int, now: float) -> None:
        """Note that the response headers have come from the server that answers the client."""
        if self.first_byte_at is None:
            self.first_byte_at = now
        if not self._prefill:
            self.prefill_answered(status, now)  # one server does both

    def end(self, now: float) -> None:
        """Note that the response is over, for whatever reason."""
        _release(self._prefill, now)
        _release(self._decode, now)


def _release(reservations: tuple[Reservation, ...], now: float) -> None:
    for reservation in reservations:
        reservation.release(now)
