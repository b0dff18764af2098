"""Endpoints are left out in the order that the filters have, and never all of them where one may do."""

import pytest

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.capabilities import capabilities
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import DEFAULT_COSTS, EndpointLoad
from dp_extproc.load.health import Health
from dp_extproc.scheduling.filters import allows, avoid, choose, healthy, read_subset
from fleet_fixtures import make_endpoint, make_facts

SETTINGS = OutlierDetectionSettings.model_validate(
    {"consecutive_failures": 2, "base_ejection_time": "1s", "max_ejection_time": "4s"}
)


def make_endpoints(addresses: str) -> list[EndpointLoad]:
    """Make a healthy endpoint for each letter, which is its address."""
    facts = make_facts(Role.DECODE)
    return [
        EndpointLoad(
            make_endpoint(Role.DECODE), name, facts, capabilities(facts), DEFAULT_COSTS, health=Health(SETTINGS)
        )
        for name in addresses
    ]


def eject(health: Health, now: float) -> None:
    for _ in range(SETTINGS.consecutive_failures):
        health.failed(now)


@pytest.mark.parametrize(
    ("values", "allowed", "forbidden"),
    [
        pytest.param(["10.0.0.1:80"], ["10.0.0.1:80"], ["10.0.0.1:81", "10.0.0.10:80"], id="one"),
        pytest.param(["10.0.0.1:80", "10.0.0.2:80"], ["10.0.0.1:80", "10.0.0.2:80"], ["10.0.0.3:80"], id="a list"),
        pytest.param([" 10.0.0.1:80 ,10.0.0.2:80, "], ["10.0.0.1:80", "10.0.0.2:80"], [""], id="commas and spaces"),
        pytest.param(["a:1,b:2", "c:3"], ["a:1", "b:2", "c:3"], [], id="both"),
        pytest.param(["10.0.0.1"], ["10.0.0.1:80", "10.0.0.1:81"], ["10.0.0.10:80"], id="all ports"),
        pytest.param(["[::1]:80"], ["[::1]:80"], ["[::1]:81"], id="IPv6"),
        pytest.param(["::1", "[::2]"], ["[::1]:80", "[::2]:80"], ["[::3]:80"], id="IPv6, all ports"),
        pytest.param([], [], ["10.0.0.1:80"], id="an empty list"),
        pytest.param([""], [], ["10.0.0.1:80"], id="an empty text"),
    ],
)
def test_hints(values: list[str], allowed: list[str], forbidden: list[str]) -> None:
    """An address is allowed if it stands in the hint, with its port or without one."""
    subset = read_subset(values)

    assert all(allows(subset, address) for address in allowed)
    assert not any(allows(subset, address) for address in forbidden)


def test_those_that_are_ejected_are_left_out() -> None:
    """Only the others are given."""
    hosts = make_endpoints("abc")
    eject(hosts[1].health, 0.0)
    assert [host.address for host in healthy(hosts, 0.5)] == ["a", "c"]


def test_never_all_are_ejected() -> None:
    """Of nobody but ejected ones, the one whose time is over first is tried."""
    hosts = make_endpoints("abc")
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
    hosts = make_endpoints("abc")
    for host in hosts:
        if host.address in ejected:
            eject(host.health, 0.0)
    assert "".join(host.address for host in choose(hosts, [frozenset(each) for each in failed], 0.5)[1]) == expected


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
    hosts = make_endpoints("abc")
    assert "".join(host.address for host in avoid(hosts, [frozenset(each) for each in failed])[1]) == expected
