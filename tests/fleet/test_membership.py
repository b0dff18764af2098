"""Changes of the set of endpoints."""

from dataclasses import replace

import pytest

from dp_extproc.engines.model import Endpoint, Role
from dp_extproc.fleet.discovery.membership import Membership, membership

A, B, C = (Endpoint(f"http://{name}:1", name, 1, "m", Role.DECODE) for name in "abc")
OTHER_B = replace(B, dp_size=4)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        pytest.param([A, B], [B, A], Membership(), id="none"),
        pytest.param([A], [A, B], Membership(added=(B,)), id="added"),
        pytest.param([A, B], [A], Membership(removed=(B,)), id="removed"),
        pytest.param([A, B], [OTHER_B, A], Membership(updated=(OTHER_B,)), id="updated"),
        pytest.param([A, B], [OTHER_B, C], Membership((C,), (OTHER_B,), (A,)), id="all"),
    ],
)
def test_membership_is_the_difference_of_two_sets(
    before: list[Endpoint], after: list[Endpoint], change: Membership
) -> None:
    """The URL identifies an endpoint; the order does not count."""
    assert membership(before, after) == change
