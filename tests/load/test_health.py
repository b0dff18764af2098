"""When an endpoint is ejected, and when it gets requests again."""

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.load.health import PROBE_SECONDS, Health

SETTINGS = OutlierDetectionSettings.model_validate(
    {"consecutive_failures": 2, "base_ejection_time": "1s", "max_ejection_time": "4s"}
)


def make_health() -> Health:
    return Health(SETTINGS)


def eject(health: Health, now: float) -> None:
    for _ in range(SETTINGS.consecutive_failures):
        health.failed(now)


def test_failures_in_a_row_eject() -> None:
    """A success between two failures begins anew."""
    health = make_health()
    health.failed(0.0)
    health.succeeded()
    health.failed(1.0)
    assert health.takes(1.0)
    health.failed(2.0)
    assert not health.takes(2.5)
    assert health.is_ejected(2.5)


def test_each_ejection_is_twice_as_long_up_to_a_limit() -> None:
    """A failed probe ejects for longer; for four seconds at most here."""
    health = make_health()
    now, lengths = 0.0, []
    eject(health, now)
    for _ in range(5):
        lengths.append(health.until - now)
        now = health.until
        health.failed(now)
    assert lengths == [1, 2, 4, 4, 4]


def test_failures_of_requests_sent_before_the_ejection_do_not_count() -> None:
    """A crash fails fifty requests at once, and the endpoint is not ejected fifty times."""
    health = make_health()
    for _ in range(50):
        health.failed(10.0)
    assert health.until == 11.0


def test_one_request_at_a_time_is_the_probe() -> None:
    """After an ejection one request goes. The next ones wait for its outcome, or until it counts as lost."""
    health = make_health()
    eject(health, 0.0)
    assert health.takes(1.0)
    health.sent(1.0)
    assert not health.takes(1.5)
    assert health.takes(1.0 + PROBE_SECONDS)
    health.succeeded()
    assert health.takes(1.5)
    health.sent(1.5)
    assert health.takes(1.5)


def test_a_change_is_reported_at_each_ejection_and_at_recovery() -> None:
    """What the filters have found holds until a change is reported."""
    changes: list[bool] = []
    health = Health(SETTINGS, lambda: changes.append(health.is_unhealthy))
    health.failed(0.0)
    health.succeeded()
    health.failed(0.0)
    assert changes == []
    health.failed(0.0)
    assert changes == [True]
    health.recovered()
    assert changes == [True, False]
    assert health.takes(0.0)
    health.succeeded()
    assert changes == [True, False]
