"""Attempts come on the books in one place: our own, told to whoever wants to know, and those of other replicas."""

import pytest

from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Target
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.load.tracker import InFlightTracker
from fleet_fixtures import Fleet, make_endpoint, make_facts

NOW = 1000.0
PREFILL, DECODE = make_endpoint(Role.PREFILL).url, make_endpoint(Role.DECODE).url


class Witness:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def opened(self, attempt: int, dispatch: PlacementRecord, now: float) -> None:
        self.told.append(("opened", attempt, dispatch, now))

    def prefill_answered(self, attempt: int, now: float) -> None:
        self.told.append(("prefill_answered", attempt, now))

    def first_token(self, attempt: int, now: float) -> None:
        self.told.append(("first_token", attempt, now))

    def ended(self, attempt: int, now: float) -> None:
        self.told.append(("ended", attempt, now))


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])


def requests(fleet: Fleet) -> tuple[float, float]:
    return fleet.host(Role.PREFILL).requests, fleet.host(Role.DECODE).requests


def test_every_event_of_our_own_attempts_is_told_once(fleet: Fleet) -> None:
    """In their order, with what another replica needs to put the attempt on its books; repeated events are not."""
    witness = Witness()
    tracker = InFlightTracker(fleet.load, witness)
    prefill = Target(fleet.host(Role.PREFILL), 2, routed=True, by_room=True, cached=30.0)
    decode = Target(fleet.host(Role.DECODE), 3, routed=True, by_room=False)
    attempt = tracker.open(prefill, decode, cost := RequestCost(100.0), NOW)
    for _ in range(2):
        attempt.prefill_answered(200, NOW + 1)
        attempt.first_byte(200, NOW + 2)
        attempt.end(NOW + 3)

    assert witness.told == [
        ("opened", 1, PlacementRecord("*", cost, DECODE, 3, PREFILL, 2, 30.0), NOW),
        ("prefill_answered", 1, NOW + 1),
        ("first_token", 1, NOW + 2),
        ("ended", 1, NOW + 3),
    ]
    assert requests(fleet) == (0, 0)


def test_what_another_replica_has_sent_counts_like_ours(fleet: Fleet) -> None:
    """On both ranks, until it ends; what is told of it is told to nobody else."""
    witness = Witness()
    dispatch = PlacementRecord("*", RequestCost(100.0), DECODE, 3, PREFILL, 2)
    attempt = InFlightTracker(fleet.load, witness).open_peer(dispatch, NOW)
    loads = fleet.host(Role.PREFILL).ranks[2].tokens, fleet.host(Role.DECODE).ranks[3].tokens
    attempt.end(NOW + 1)

    assert loads == (25, 1100)
    assert requests(fleet) == (0, 0)
    assert witness.told == []


@pytest.mark.parametrize(
    "dispatch",
    [
        PlacementRecord("*", RequestCost(100.0), "http://elsewhere:1", 0, "http://elsewhere:2", 0),
        PlacementRecord("*", RequestCost(100.0), DECODE, 4, PREFILL, -1),
    ],
    ids=["servers", "ranks"],
)
def test_what_is_not_known_here_is_left_out(fleet: Fleet, dispatch: PlacementRecord) -> None:
    """Replicas may differ in what they have discovered; nothing is booked where nothing is."""
    attempt = InFlightTracker(fleet.load).open_peer(dispatch, NOW)

    assert requests(fleet) == (0, 0)
    attempt.end(NOW + 1)
