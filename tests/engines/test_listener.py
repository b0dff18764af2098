"""Engine events reach every listener, whatever one of them raises."""

import pytest

from dp_extproc.engines.listener import EngineFailure, EngineListeners, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, Role
from engines.test_capabilities import facts

ENDPOINT = Endpoint("http://a:1", "a", 1, "m", Role.WORKER)


class Recorder:
    """Writes down events in a list that it shares, and raises over some."""

    def __init__(self, name: str, events: list[str], raises: str = "") -> None:
        self.name = name
        self.events = events
        self.raises = raises

    def _record(self, event: str) -> None:
        self.events.append(f"{self.name} {event}")
        if event == self.raises:
            raise ZeroDivisionError("division by zero")

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        self._record("discovered")

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        self._record("sampled")

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        assert not failure.is_away
        self._record(failure.kind.value)


def emit(raises: str) -> tuple[list[str], list[str]]:
    """Emit each event once to two listeners, of which the first raises over one. Returns events and reports."""
    events: list[str] = []
    reports: list[str] = []
    listeners = EngineListeners(
        (Recorder("cache", events, raises), Recorder("metrics", events)),
        lambda endpoint, error: reports.append(f"{endpoint.url} {type(error).__name__}"),
    )
    listeners.discovered(ENDPOINT, "10.0.0.1:1", facts("0.5.23", Mode.UNIFIED), 1.0)
    listeners.sampled(ENDPOINT, LoadPage(()), 1.0, 2.0)
    listeners.failed(ENDPOINT, EngineFailure(FailureKind.HTTP_STATUS, "503"), 3.0)
    return events, reports


def test_listeners_get_events_in_their_order() -> None:
    """The load cache is first, so that all others see what it made of the event."""
    names = ["discovered", "sampled", "http_status"]

    assert emit("") == ([f"{who} {name}" for name in names for who in ("cache", "metrics")], [])


@pytest.mark.parametrize("event", ["discovered", "sampled"])
def test_a_listener_that_raises_does_not_keep_events_from_others(event: str) -> None:
    """The exception is reported, and the endpoint fails for all listeners: what the first holds of it is incomplete."""
    events, reports = emit(event)

    at = events.index(f"metrics {event}")
    assert events[at + 1 : at + 3] == ["cache internal", "metrics internal"]
    assert reports == ["http://a:1 ZeroDivisionError"]
    assert len(events) == 8


def test_a_listener_that_raises_over_a_failure_is_reported_once() -> None:
    """A failure leads to no further failure, or there would be no end of them."""
    events, reports = emit("http_status")

    assert len(events) == 6
    assert reports == ["http://a:1 ZeroDivisionError"]
