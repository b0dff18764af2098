"""Every rule by which a peer's books are kept, one situation each."""

from collections.abc import Sequence

import pytest

from dp_extproc.sync.messages import Batch, Dispatched, Ended, Event, FirstToken, PrefillAnswered, Snapshot
from dp_extproc.sync.peers import ASK_AGAIN, FIRST_ASK, Peers
from sync.books import Books, dispatch_to

SILENCE = 3.0


class World:
    """Peers under test: the clock of the peer "a" is 1000 s ahead, and messages take no time."""

    def __init__(self) -> None:
        self.books = Books()
        self.peers = Peers(self.books.open_foreign, SILENCE)

    def batch(self, sequence: int, *events: Event, at: float = 0.0) -> None:
        self.peers.batch(Batch("a", sequence, 1000.0 + at, events), at)

    def snapshot(self, sequence: int, *events: Event, part: int = 0, parts: int = 1, at: float = 0.0) -> None:
        self.peers.snapshot(Snapshot("a", sequence, 1000.0 + at, part, parts, events), at)

    @property
    def in_doubt(self) -> bool:
        return self.peers.status(0.0)[0].in_doubt


@pytest.fixture
def world() -> World:
    """Nobody has been heard yet."""
    return World()


def opened(*attempts: int) -> Sequence[Event]:
    """Attempts that began as the clock of "a" stood at 1000; each has the rank of its number."""
    return [Dispatched(attempt, 1000.0, dispatch_to(attempt)) for attempt in attempts]


def test_a_dispatch_comes_on_the_books_at_its_moment(world: World) -> None:
    """Ages are what counts: an event 15 ms before its message is put 15 ms before its arrival."""
    world.batch(1, Dispatched(1, 1004.985, dispatch_to(1)), at=5.0)

    (entry,) = world.books.open
    assert entry.dispatch == dispatch_to(1)
    assert entry.opened_at == pytest.approx(4.985)


def test_an_attempt_goes_its_way(world: World) -> None:
    """All four events reach the books, each with its own moment."""
    world.batch(1, *opened(1), at=0.0)
    world.batch(2, PrefillAnswered(1, 1000.2), FirstToken(1, 1000.3), at=0.4)
    world.batch(3, Ended(1, 1000.9), at=1.0)

    (entry,) = world.books.entries
    moments = [entry.opened_at, entry.answered_at, entry.first_byte_at, entry.ended_at]
    assert moments == [pytest.approx(moment) for moment in (0.0, 0.2, 0.3, 0.9)]


def test_no_event_is_before_its_attempt(world: World) -> None:
    """A message that was quicker than the one with the dispatch does not turn time back."""
    world.peers.batch(Batch("a", 1, 1000.0, tuple(opened(1))), 0.5)  # half a second on its way
    world.peers.batch(Batch("a", 2, 1000.2, (Ended(1, 1000.1),)), 0.6)

    (entry,) = world.books.entries
    assert (entry.opened_at, entry.ended_at) == (0.5, 0.5)


def test_repeated_batches_change_nothing(world: World) -> None:
    """The same batch again is counted, and an attempt that has ended does not begin again."""
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))

    assert len(world.books.entries) == 1
    assert world.books.open == []
    assert world.peers.anomalies["duplicate"] == 2


def test_a_batch_that_was_overtaken_is_waited_for(world: World) -> None:
    """Batches take effect in their order, whatever the order of their arrival."""
    world.batch(1)
    world.batch(3, Ended(1, 1000.0))
    assert world.in_doubt
    world.batch(2, *opened(1, 2))

    assert not world.in_doubt
    assert world.books.open_ranks == [2]
    assert world.peers.anomalies["gap"] == 1


def test_a_gap_makes_us_ask(world: World) -> None:
    """The peer is asked once it is unlikely that the missing batch still comes, and again while it does not answer."""
    world.batch(1)
    world.batch(3)

    asked = [world.peers.review(at) for at in (0.0, FIRST_ASK, FIRST_ASK + 0.1, FIRST_ASK + ASK_AGAIN)]

    assert asked == [[], ["a"], [], ["a"]]


def test_no_gap_no_question(world: World) -> None:
    """A peer of which nothing is missing is not asked."""
    world.batch(1)
    world.batch(2)

    assert world.peers.review(1.0) == []


def test_who_comes_later_asks_for_what_was_before(world: World) -> None:
    """The first batch that is heard of a peer may be its thousandth: nothing is known until the snapshot."""
    world.batch(1000, Ended(1, 1000.0))
    assert world.peers.review(FIRST_ASK) == ["a"]
    world.snapshot(1000, *opened(2, 3))

    assert world.books.open_ranks == [2, 3]
    assert world.peers.review(10 * FIRST_ASK) == []
    assert world.peers.anomalies["gap"] == 0


def test_a_snapshot_replaces_what_is_known(world: World) -> None:
    """What it does not know has ended, what it knows stays, what is new to us begins, with all that has happened."""
    world.batch(1, *opened(1, 2))
    world.batch(4)
    world.snapshot(4, *opened(2), FirstToken(2, 1000.0), *opened(3), PrefillAnswered(3, 1000.0))

    ended, stayed, begun = world.books.entries
    assert ended.ended_at is not None
    assert (stayed.ended_at, stayed.first_byte_at, stayed.answered_at) == (None, 0.0, None)
    assert (begun.ended_at, begun.first_byte_at, begun.answered_at) == (None, None, 0.0)
    assert not world.in_doubt


def test_batches_after_the_snapshot_follow_it(world: World) -> None:
    """What was heard after the gap is applied to the snapshot if it is younger, and left out if it is older."""
    world.batch(1, *opened(1))
    world.batch(3, *opened(3))
    world.batch(5, Ended(3, 1000.0), *opened(5))
    world.snapshot(4, *opened(3, 4))

    assert world.books.open_ranks == [4, 5]
    assert not world.in_doubt


def test_a_snapshot_that_leaves_a_gap_is_not_the_last(world: World) -> None:
    """If something after the snapshot is missing, too, the peer is asked again."""
    world.batch(1)
    world.batch(6)
    world.snapshot(4, *opened(4))

    assert world.in_doubt
    assert world.peers.review(FIRST_ASK) == ["a"]


def test_a_late_snapshot_changes_nothing(world: World) -> None:
    """A snapshot of a state that has been passed would bring back what has ended."""
    world.batch(1, *opened(1))
    world.batch(2, Ended(1, 1000.0))
    world.snapshot(1, *opened(1))

    assert world.books.open == []


def test_parts_are_put_together(world: World) -> None:
    """A snapshot counts once its last part is there, in whatever order they come."""
    world.batch(9)
    world.snapshot(9, FirstToken(1, 1000.0), *opened(2), part=1, parts=2)
    assert world.books.open == []
    world.snapshot(9, *opened(1), part=0, parts=2)

    assert world.books.open_ranks == [1, 2]
    assert world.books.entries[0].first_byte_at == 0.0


def test_parts_of_different_snapshots_do_not_mix(world: World) -> None:
    """A snapshot of which a part was lost is given up for a newer one."""
    world.batch(9)
    world.snapshot(9, *opened(1), part=0, parts=2)
    world.snapshot(10, *opened(2), part=1, parts=2)
    world.snapshot(9, *opened(3), part=1, parts=2)
    assert world.books.open == []
    world.snapshot(10, *opened(4), part=0, parts=2)

    assert world.books.open_ranks == [2, 4]


def test_a_silent_peer_takes_its_load_along(world: World) -> None:
    """After the silence all that it had ends; until then it stays."""
    world.batch(1, *opened(1, 2))
    world.peers.review(SILENCE - 0.1)
    assert world.books.open_ranks == [1, 2]
    world.peers.review(SILENCE)

    assert world.books.open == []
    assert world.peers.status(SILENCE) == []
    assert world.peers.anomalies["peer_timeout"] == 1


def test_a_peer_that_speaks_again_is_taken_as_new(world: World) -> None:
    """It tells all that it has open, once it is asked."""
    world.batch(1, *opened(1))
    world.peers.review(SILENCE)
    world.batch(2, *opened(2), at=SILENCE)
    assert world.peers.review(SILENCE + FIRST_ASK) == ["a"]
    world.snapshot(2, *opened(1, 2), at=SILENCE)

    assert world.books.open_ranks == [1, 2]


def test_strays_are_counted(world: World) -> None:
    """Events of attempts that nobody has heard of change nothing."""
    world.batch(1, PrefillAnswered(1, 1000.0), FirstToken(2, 1000.0), Ended(3, 1000.0))

    assert world.books.entries == []
    assert world.peers.anomalies["unknown_request"] == 3


def test_peers_do_not_mix() -> None:
    """Two peers number their attempts alike; the end of one is not the end of the other."""
    books = Books()
    peers = Peers(books.open_foreign, SILENCE)
    for rank, replica in enumerate(("a", "b")):
        peers.batch(Batch(replica, 1, 1000.0, (Dispatched(1, 1000.0, dispatch_to(rank)),)), 0.0)
    peers.batch(Batch("a", 2, 1000.0, (Ended(1, 1000.0),)), 0.1)

    assert books.open_ranks == [1]
    assert [(status.replica, status.requests) for status in peers.status(0.1)] == [("a", 0), ("b", 1)]
