"""Listeners of attempts that fail."""

import pytest

from dp_extproc.attempt.listener import Decided, LegFailed
from dp_extproc.engines.model import Role
from dp_extproc.extproc.listeners import AttemptListeners
from dp_extproc.request.rejection import Reason
from extproc.wire import Watcher


class Broken:
    """A listener that raises whatever is reported to it."""

    def __getattr__(self, name: str) -> None:
        raise RuntimeError(name)


def test_listener_that_raises_is_logged_and_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """An attempt goes on, whatever happens to its metrics."""
    watcher = Watcher()
    listeners = AttemptListeners((Broken(), watcher))  # type: ignore[arg-type]
    listeners.attempt_opened()
    listeners.decided(Decided("routed", 0.1))
    listeners.leg_failed(LegFailed(Role.DECODE, Reason.DECODE_FAILED, retried=True))
    listeners.leg_missing()
    listeners.destination_mismatch()
    listeners.attempt_closed()

    assert watcher == Watcher(
        opened=1,
        closed=1,
        decisions=["routed"],
        failures=[(Role.DECODE, Reason.DECODE_FAILED, True)],
        unseen=1,
        elsewhere=1,
    )
    assert caplog.text.count("a listener of attempts has failed") == 6
