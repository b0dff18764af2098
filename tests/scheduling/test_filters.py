"""Endpoints are filtered by subset, failed attempts and health, and never all of them where one may work."""

import pytest

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.model import Role
from dp_extproc.engines.sglang.capabilities import capabilities
from dp_extproc.load.endpoint import DEFAULT_COSTS, EndpointLoad
from dp_extproc.load.health import Health
from dp_extproc.scheduling.filters import allows, avoid, healthy, preferred, read_subset
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
def test_subset_allows_the_addresses_of_its_hint(values: list[str], allowed: list[str], forbidden: list[str]) -> None:
    """A hint has addresses with their port or without one."""
    subset = read_subset(values)

    assert all(allows(subset, address) for address in allowed)
    assert not any(allows(subset, address) for address in forbidden)


def test_healthy_leaves_out_ejected_endpoints() -> None:
    """Only the healthy endpoints are returned."""
    endpoints = make_endpoints("abc")
    eject(endpoints[1].health, 0.0)
    assert [endpoint.address for endpoint in healthy(endpoints, 0.5)] == ["a", "c"]


def test_healthy_returns_the_first_to_recover_if_all_are_ejected() -> None:
    """A request is rather tried on an ejected endpoint than refused."""
    endpoints = make_endpoints("abc")
    for moment, endpoint in zip((3.0, 1.0, 2.0), endpoints, strict=True):
        eject(endpoint.health, moment)
    assert [endpoint.address for endpoint in healthy(endpoints, 3.5)] in (["b"], ["b", "c"])
    assert [endpoint.address for endpoint in healthy(endpoints, 1.5)] == ["b"]


@pytest.mark.parametrize(
    ("failed", "ejected", "expected"),
    [
        pytest.param(["a"], "b", "c", id="a-well-one"),
        pytest.param(["a", "c"], "b", "b", id="an-ejected-one-rather-than-one-that-has-failed"),
        pytest.param(["abc"], "b", "ac", id="a-well-one-if-all-have-failed"),
        pytest.param([], "b", "ac", id="the-first-attempt"),
    ],
)
def test_retry_prefers_an_ejected_endpoint_to_one_that_has_failed(
    failed: list[str], ejected: str, expected: str
) -> None:
    """An ejected endpoint may work again, while the other one is known to fail this request."""
    endpoints = make_endpoints("abc")
    for endpoint in endpoints:
        if endpoint.address in ejected:
            eject(endpoint.health, 0.0)
    assert (
        "".join(endpoint.address for endpoint in preferred(endpoints, [frozenset(each) for each in failed], 0.5)[1])
        == expected
    )


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
def test_retry_avoids_endpoints_of_failed_attempts(failed: list[str], expected: str) -> None:
    """Endpoints of failed attempts are avoided as far as there are others."""
    endpoints = make_endpoints("abc")
    assert (
        "".join(endpoint.address for endpoint in avoid(endpoints, [frozenset(each) for each in failed])[1]) == expected
    )
