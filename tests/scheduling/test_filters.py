"""Subset hints in every form that gateways send them, re-expressed from the endpoint-picker protocol (proposal 004)."""

import pytest

from dp_extproc.scheduling.subset import allows, read_subset


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
