"""All listeners of attempts behind one that cannot fail."""

import logging
from collections.abc import Callable, Iterable

from dp_extproc.attempt.listener import AttemptListener, Decided, LegFailed

_log = logging.getLogger(__name__)


class AttemptListeners:
    """Calls each listener. One that raises is logged, and never ends an attempt."""

    def __init__(self, listeners: Iterable[AttemptListener]) -> None:
        self._listeners = tuple(listeners)

    def attempt_opened(self) -> None:
        self._call(lambda listener: listener.attempt_opened())

    def decided(self, decided: Decided) -> None:
        self._call(lambda listener: listener.decided(decided))

    def leg_failed(self, failed: LegFailed) -> None:
        self._call(lambda listener: listener.leg_failed(failed))

    def leg_missing(self) -> None:
        self._call(lambda listener: listener.leg_missing())

    def destination_mismatch(self) -> None:
        self._call(lambda listener: listener.destination_mismatch())

    def held(self, seconds: float, *, in_vain: bool) -> None:
        self._call(lambda listener: listener.held(seconds, in_vain=in_vain))

    def responses_skipped(self) -> None:
        self._call(lambda listener: listener.responses_skipped())

    def attempt_closed(self) -> None:
        self._call(lambda listener: listener.attempt_closed())

    def _call(self, report: Callable[[AttemptListener], None]) -> None:
        for listener in self._listeners:
            try:
                report(listener)
            except Exception:  # noqa: BLE001 - whatever it is, it is no fault of the attempt
                _log.exception("a listener of attempts has failed")
