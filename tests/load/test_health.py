"""When an endpoint is ejected, and when it gets requests again."""

from dataclasses import dataclass

import pytest

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.load.health import PROBE_SECONDS, Health, choose, healthy, others

SETTINGS = OutlierDetectionSettings.model_validate(
    {"consecutive_failures": 2, "base_ejection_time": "1s", "max_ejection_time": "4s"}
)


@dataclass(frozen=True)
class Host:
    address: str
    health: Health


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


def test_those_that_are_ejected_are_left_out() -> None:
    """Only the others are given."""
    hosts = [Host(name, make_health()) for name in "abc"]
    eject(hosts[1].health, 0.0)
    assert [host.address for host in healthy(hosts, 0.5)] == ["a", "c"]


def test_never_all_are_ejected() -> None:
    """Of nobody but ejected ones, the one whose time is over first is tried."""
    hosts = [Host(name, make_health()) for name in "abc"]
    for moment, host in zip((3.0, 1.0, 2.0), hosts, strict=True):
        eject(host.health, moment)
    assert [host.address for host in healthy(hosts, 3.5)] in (["b"], ["b", "c"])
    assert [host.address for host in healthy(hosts, 1.5)] == ["b"]


@pytest.mark.parametrize(
    ("failed", "ejected", "expected"),
    [
        pytest.param(["a"], "b", "c", id="a-well-one"),
        pytest.param(["a", "c"], "b", "b", id="an-ejected-one-rather-than-one-that-has-failed"),
        pytest.param(["abc"], "b", "ac", id="a-well-one-if-all-have-failed"),
        pytest.param([], "b", "ac", id="the-first-attempt"),
    ],
)
def test_a_retry_goes_to_an_ejected_host_rather_than_back(failed: list[str], ejected: str, expected: str) -> None:
    """Who has just failed a request is not asked for it again, if there is anybody else."""
    hosts = [Host(name, make_health()) for name in "abc"]
    for host in hosts:
        if host.address in ejected:
            eject(host.health, 0.0)
    assert "".join(host.address for host in choose(hosts, [frozenset(each) for each in failed], 0.5)) == expected


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        pytest.param(["a"], "bc", id="another"),
        pytest.param(["a", "b"], "c", id="none-that-has-failed"),
        pytest.param(["a", "b", "c"], "ab", id="at-least-not-the-last-one"),
        pytest.param(["abc"], "abc", id="anybody-rather-than-nobody"),
        pytest.param(["x"], "abc", id="unknown-ones"),
    ],
)
def test_a_retry_goes_elsewhere(failed: list[str], expected: str) -> None:
    """Hosts of failed attempts are avoided as far as there are others."""
    hosts = [Host(name, make_health()) for name in "abc"]
    assert "".join(host.address for host in others(hosts, [frozenset(each) for each in failed])) == expected
