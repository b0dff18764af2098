"""Test every rule by which the attempts of peers are followed, one situation each."""

from collections.abc import Sequence

import pytest

from dp_extproc.sync.messages import (
    Batch,
    Ended,
    EngineLost,
    Event,
    FirstToken,
    Notice,
    Placed,
    PrefillAnswered,
    Snapshot,
    write_notice,
)
from dp_extproc.sync.peers import FIRST_REQUEST_SECONDS, REQUEST_AGAIN_SECONDS, Peers
from sync.peer_requests import PeerRequests, record_to

PEER_TIMEOUT = 3.0


class World:
    """Peers under test: the clock of the peer "a" is 1000 s ahead, and messages take no time."""

    def __init__(self) -> None:
        self.requests = PeerRequests()
        self.heeded: list[tuple[Notice, float]] = []
        self.peers = Peers(self.requests.open_peer, PEER_TIMEOUT, lambda *notice: self.heeded.append(notice))

    def batch(self, sequence: int, *events: Event, at: float = 0.0, notices: Sequence[Notice] = ()) -> None:
        written = tuple(map(write_notice, notices))
        self.peers.batch(Batch("a", sequence, 1000.0 + at, events, written), at)

    def snapshot(
        self, sequence: int, *events: Event, part: int = 0, parts: int = 1, at: float = 0.0,
        notices: Sequence[Notice] = (),
    ) -> None:  # fmt: skip
        written = tuple(map(write_notice, notices))
        self.peers.snapshot(Snapshot("a", sequence, 1000.0 + at, part, parts, events, written), at)

    @property
    def in_doubt(self) -> bool:
        return self.peers.status(0.0)[0].in_doubt


@pytest.fixture
def world() -> World:
    """Make peers without any message so far."""
    return World()


def opened(*attempts: int) -> Sequence[Event]:
    """Make attempts that were placed as the clock of "a" was at 1000; each has the rank of its number."""
    return [Placed(attempt, 1000.0, record_to(attempt)) for attempt in attempts]


def test_attempt_opens_at_its_own_moment(world: World) -> None:
    """An event 15 ms before its message counts as 15 ms before the arrival."""
    world.batch(1, Placed(1, 1004.985, record_to(1)), at=5.0)

    (entry,) = world.requests.open
    assert entry.record == record_to(1)
    assert entry.opened_at == pytest.approx(4.985)


def test_all_four_events_reach_the_reservations(world: World) -> None:
    """Each has its own moment."""
    world.batch(1, *opened(1), at=0.0)
    world.batch(2, PrefillAnswered(1, 1000.2), FirstToken(1, 1000.3), at=0.4)
    world.batch(3, Ended(1, 1000.9), at=1.0)

    (entry,) = world.requests.entries
    moments = [entry.opened_at, entry.answered_at, entry.first_byte_at, entry.ended_at]
    assert moments == [pytest.approx(moment) for moment in (0.0, 0.2, 0.3, 0.9)]


def test_event_is_never_before_its_attempt(world: World) -> None:
    """A message that was faster than the one with the attempt does not turn time back."""
    world.peers.batch(Batch("a", 1, 1000.0, tuple(opened(1))), 0.5)  # half a second on its way
    world.peers.batch(Batch("a", 2, 1000.2, (Ended(1, 1000.1),)), 0.6)

    (entry,) = world.requests.entries
    assert (entry.opened_at, entry.ended_at) == (0.5, 0.5)


def test_repeated_batch_is_counted_and_dropped(world: World) -> None:
    """An attempt that has ended does not begin again."""
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))

    assert len(world.requests.entries) == 1
    assert world.requests.open == []
    assert world.peers.anomalies["duplicate"] == 2


def test_batches_apply_in_their_order(world: World) -> None:
    """The order of their arrival does not matter."""
    world.batch(1)
    world.batch(3, Ended(1, 1000.0))
    assert world.in_doubt
    world.batch(2, *opened(1, 2))

    assert not world.in_doubt
    assert world.requests.open_ranks == [2]
    assert world.peers.anomalies["gap"] == 1


def test_gap_requests_a_snapshot(world: World) -> None:
    """The request is sent once the missing batch is unlikely to arrive, and again while there is no answer."""
    world.batch(1)
    world.batch(3)

    asked = [
        world.peers.review(at)
        for at in (
            0.0,
            FIRST_REQUEST_SECONDS,
            FIRST_REQUEST_SECONDS + 0.1,
            FIRST_REQUEST_SECONDS + REQUEST_AGAIN_SECONDS,
        )
    ]

    assert asked == [[], ["a"], [], ["a"]]


def test_snapshot_is_not_requested_without_a_gap(world: World) -> None:
    """A peer without missing batches is left alone."""
    world.batch(1)
    world.batch(2)

    assert world.peers.review(1.0) == []


def test_snapshot_is_requested_if_the_first_batch_is_late(world: World) -> None:
    """The first batch of a peer may be its thousandth; nothing is applied until the snapshot."""
    world.batch(1000, Ended(1, 1000.0))
    assert world.peers.review(FIRST_REQUEST_SECONDS) == ["a"]
    world.snapshot(1000, *opened(2, 3))

    assert world.requests.open_ranks == [2, 3]
    assert world.peers.review(10 * FIRST_REQUEST_SECONDS) == []
    assert world.peers.anomalies["gap"] == 0


def test_snapshot_replaces_the_attempts_of_a_peer(world: World) -> None:
    """Attempts that are not in it end, others stay, and new ones begin with all their events."""
    world.batch(1, *opened(1, 2))
    world.batch(4)
    world.snapshot(4, *opened(2), FirstToken(2, 1000.0), *opened(3), PrefillAnswered(3, 1000.0))

    ended, stayed, begun = world.requests.entries
    assert ended.ended_at is not None
    assert (stayed.ended_at, stayed.first_byte_at, stayed.answered_at) == (None, 0.0, None)
    assert (begun.ended_at, begun.first_byte_at, begun.answered_at) == (None, None, 0.0)
    assert not world.in_doubt


def test_batches_after_a_snapshot_apply_to_it(world: World) -> None:
    """Batches behind the gap are applied if they are newer than the snapshot, and dropped if older."""
    world.batch(1, *opened(1))
    world.batch(3, *opened(3))
    world.batch(5, Ended(3, 1000.0), *opened(5))
    world.snapshot(4, *opened(3, 4))

    assert world.requests.open_ranks == [4, 5]
    assert not world.in_doubt


def test_snapshot_is_requested_again_if_a_gap_is_left(world: World) -> None:
    """A batch after the snapshot may be missing, too."""
    world.batch(1)
    world.batch(6)
    world.snapshot(4, *opened(4))

    assert world.in_doubt
    assert world.peers.review(FIRST_REQUEST_SECONDS) == ["a"]


def test_snapshot_is_dropped_if_late(world: World) -> None:
    """It would bring back attempts that have ended."""
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))
    world.snapshot(1, *opened(1))

    assert world.requests.open == []


def test_snapshot_applies_with_its_last_part(world: World) -> None:
    """The order of the parts does not matter."""
    world.batch(9)
    world.snapshot(9, FirstToken(1, 1000.0), *opened(2), part=1, parts=2)
    assert world.requests.open == []
    world.snapshot(9, *opened(1), part=0, parts=2)

    assert world.requests.open_ranks == [1, 2]
    assert world.requests.entries[0].first_byte_at == 0.0


def test_snapshot_with_a_lost_part_gives_way_to_a_newer_one(world: World) -> None:
    """Parts of different snapshots do not mix."""
    world.batch(9)
    world.snapshot(9, *opened(1), part=0, parts=2)
    world.snapshot(10, *opened(2), part=1, parts=2)
    world.snapshot(9, *opened(3), part=1, parts=2)
    assert world.requests.open == []
    world.snapshot(10, *opened(4), part=0, parts=2)

    assert world.requests.open_ranks == [2, 4]


def test_attempts_end_at_the_peer_timeout(world: World) -> None:
    """Until then they stay."""
    world.batch(1, *opened(1, 2))
    world.peers.review(PEER_TIMEOUT - 0.1)
    assert world.requests.open_ranks == [1, 2]
    world.peers.review(PEER_TIMEOUT)

    assert world.requests.open == []
    assert world.peers.status(PEER_TIMEOUT) == []
    assert world.peers.anomalies["peer_timeout"] == 1


def test_peer_is_new_if_it_returns_after_the_timeout(world: World) -> None:
    """Its snapshot is requested."""
    world.batch(1, *opened(1))
    world.peers.review(PEER_TIMEOUT)
    world.batch(2, *opened(2), at=PEER_TIMEOUT)
    assert world.peers.review(PEER_TIMEOUT + FIRST_REQUEST_SECONDS) == ["a"]
    world.snapshot(2, *opened(1, 2), at=PEER_TIMEOUT)

    assert world.requests.open_ranks == [1, 2]


def test_events_of_unknown_attempts_are_counted(world: World) -> None:
    """They change nothing."""
    world.batch(1, PrefillAnswered(1, 1000.0), FirstToken(2, 1000.0), Ended(3, 1000.0))

    assert world.requests.entries == []
    assert world.peers.anomalies["unknown_request"] == 3


def test_peers_may_use_the_same_numbers() -> None:
    """The end of an attempt is not the end of a peer's attempt of the same number."""
    requests = PeerRequests()
    peers = Peers(requests.open_peer, PEER_TIMEOUT)
    for rank, replica in enumerate(("a", "b")):
        peers.batch(Batch(replica, 1, 1000.0, (Placed(1, 1000.0, record_to(rank)),)), 0.0)
    peers.batch(Batch("a", 2, 1000.0, (Ended(1, 1000.0),)), 0.1)

    assert requests.open_ranks == [1]
    assert [(status.replica, status.requests) for status in peers.status(0.1)] == [("a", 0), ("b", 1)]


def test_notice_reaches_its_listener_at_its_own_moment(world: World) -> None:
    """Those of a batch wait for the batches before it, and a snapshot brings those that were missed."""
    first, second, third = (EngineLost(1000.0 + moment, "f", "10.0.0.2:30000") for moment in (0.5, 1.5, 3.5))
    world.batch(1, at=1.0, notices=[first])
    world.batch(3, at=4.0, notices=[third])
    assert [notice for notice, _ in world.heeded] == [first]
    world.snapshot(2, at=4.0, notices=[first, second])

    assert world.heeded == [(first, 0.5), (first, 0.5), (second, 1.5), (third, 3.5)]
