"""Requests of this replica, and those that peers publish, are opened in one place."""

import pytest

from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Target
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.load.tracker import InFlightTracker
from fleet_fixtures import Fleet, make_endpoint, make_facts

NOW = 1000.0
PREFILL, DECODE = make_endpoint(Role.PREFILL).url, make_endpoint(Role.DECODE).url


class Witness:
    """A listener that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def opened(self, attempt: int, record: PlacementRecord, now: float) -> None:
        self.calls.append(("opened", attempt, record, now))

    def prefill_answered(self, attempt: int, now: float) -> None:
        self.calls.append(("prefill_answered", attempt, now))

    def first_token(self, attempt: int, now: float) -> None:
        self.calls.append(("first_token", attempt, now))

    def ended(self, attempt: int, now: float) -> None:
        self.calls.append(("ended", attempt, now))


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])


def requests(fleet: Fleet) -> tuple[float, float]:
    return fleet.endpoint(Role.PREFILL).requests, fleet.endpoint(Role.DECODE).requests


def test_every_event_of_an_own_request_reaches_the_listener_once(fleet: Fleet) -> None:
    """In their order, with what a peer needs to reserve the same; repeated events do not."""
    witness = Witness()
    tracker = InFlightTracker(fleet.load, witness)
    prefill = Target(fleet.endpoint(Role.PREFILL), 2, routed=True, by_room=True, cached=30.0)
    decode = Target(fleet.endpoint(Role.DECODE), 3, routed=True, by_room=False)
    attempt = tracker.open(prefill, decode, cost := RequestCost(100.0), NOW)
    for _ in range(2):
        attempt.prefill_answered(200, NOW + 1)
        attempt.first_byte(200, NOW + 2)
        attempt.end(NOW + 3)

    assert witness.calls == [
        ("opened", 1, PlacementRecord("*", cost, DECODE, 3, PREFILL, 2, 30.0), NOW),
        ("prefill_answered", 1, NOW + 1),
        ("first_token", 1, NOW + 2),
        ("ended", 1, NOW + 3),
    ]
    assert requests(fleet) == (0, 0)


def test_a_request_of_a_peer_counts_like_an_own_one(fleet: Fleet) -> None:
    """It counts on both ranks until it ends, and reaches no listener."""
    witness = Witness()
    record = PlacementRecord("*", RequestCost(100.0), DECODE, 3, PREFILL, 2)
    attempt = InFlightTracker(fleet.load, witness).open_peer(record, NOW)
    loads = fleet.endpoint(Role.PREFILL).ranks[2].tokens, fleet.endpoint(Role.DECODE).ranks[3].tokens
    attempt.end(NOW + 1)

    assert loads == (25, 1100)
    assert requests(fleet) == (0, 0)
    assert witness.calls == []


@pytest.mark.parametrize(
    "record",
    [
        PlacementRecord("*", RequestCost(100.0), "http://elsewhere:1", 0, "http://elsewhere:2", 0),
        PlacementRecord("*", RequestCost(100.0), DECODE, 4, PREFILL, -1),
    ],
    ids=["endpoints", "ranks"],
)
def test_unknown_endpoints_and_ranks_of_a_peer_are_left_out(fleet: Fleet, record: PlacementRecord) -> None:
    """Replicas may differ in what they have discovered."""
    attempt = InFlightTracker(fleet.load).open_peer(record, NOW)

    assert requests(fleet) == (0, 0)
    attempt.end(NOW + 1)
