"""Test which messages an outbox collects, and when."""

from dp_extproc.sync.messages import (
    REPEATED,
    Batch,
    Ended,
    EngineLost,
    FirstToken,
    Placed,
    PrefillAnswered,
    Snapshot,
    SnapshotRequest,
    decode,
    write_notice,
)
from dp_extproc.sync.outbox import HEARTBEAT, Outbox
from sync.peer_requests import RECORD, record_to


def started() -> Outbox:
    """Make an outbox that has just published a heartbeat."""
    outbox = Outbox("a")
    assert [decode(data) for data in outbox.collect(0.0)] == [Batch("a", 1, 0.0, ())]
    return outbox


def test_events_go_out_in_one_batch() -> None:
    """Events since the last batch go out in order, with the clock's reading at sending."""
    outbox = started()
    outbox.opened(7, RECORD, 0.01)
    outbox.prefill_answered(7, 0.02)
    outbox.first_token(7, 0.03)
    outbox.ended(7, 0.04)

    (message,) = map(decode, outbox.collect(0.05))

    events = (Placed(7, 0.01, RECORD), PrefillAnswered(7, 0.02), FirstToken(7, 0.03), Ended(7, 0.04))
    assert message == Batch("a", 2, 0.05, events)
    assert outbox._open == {}


def test_outbox_sends_nothing_without_events() -> None:
    """Before the heartbeat is due, there is no message either."""
    outbox = started()
    outbox.opened(7, RECORD, 0.01)
    outbox.collect(0.02)

    assert outbox.collect(0.02 + HEARTBEAT / 2) == []


def test_outbox_sends_an_empty_batch_as_heartbeat() -> None:
    """It takes a sequence number, by which peers detect missing batches."""
    outbox = started()

    assert [decode(data) for data in outbox.collect(HEARTBEAT)] == [Batch("a", 2, HEARTBEAT, ())]


def test_events_of_ended_attempts_are_not_sent() -> None:
    """An attempt ends once, and has no events after that."""
    outbox = started()
    outbox.opened(7, RECORD, 0.01)
    outbox.ended(7, 0.02)
    outbox.collect(0.03)
    outbox.first_token(7, 0.04)
    outbox.ended(7, 0.04)

    assert outbox.collect(0.05) == []


def test_snapshot_requests_are_sent_once() -> None:
    """Two requests for one replica before the next messages are one."""
    outbox = started()
    for of in ("b", "b", None):
        outbox.request_snapshot(of)

    assert [decode(data) for data in outbox.collect(0.01)] == [SnapshotRequest("a", "b"), SnapshotRequest("a", None)]
    assert outbox.collect(0.02) == []


def test_snapshot_has_all_open_attempts() -> None:
    """A snapshot follows a batch, whose number it bears, and has all events of open attempts."""
    outbox = started()
    for attempt in (1, 2, 3):
        outbox.opened(attempt, record_to(attempt), 0.01)
    outbox.first_token(2, 0.02)
    outbox.collect(0.03)
    outbox.ended(1, 0.04)
    outbox.send_snapshot()
    outbox.send_snapshot()

    batch, snapshot = map(decode, outbox.collect(0.05))

    assert batch == Batch("a", 3, 0.05, (Ended(1, 0.04),))
    still_open = (Placed(2, 0.01, record_to(2)), FirstToken(2, 0.02), Placed(3, 0.01, record_to(3)))
    assert snapshot == Snapshot("a", 3, 0.05, 0, 1, still_open)


def test_snapshot_is_sent_empty_without_open_attempts() -> None:
    """An empty snapshot ends the attempts that peers still have."""
    outbox = started()
    outbox.send_snapshot()

    assert [decode(data) for data in outbox.collect(0.01)] == [
        Batch("a", 2, 0.01, ()),
        Snapshot("a", 2, 0.01, 0, 1, ()),
    ]


def test_snapshot_comes_in_parts_if_large() -> None:
    """Thousands of attempts take several messages, all of one sequence number."""
    outbox = started()
    for attempt in range(3000):
        outbox.opened(attempt, record_to(attempt), 0.01)
    outbox.send_snapshot()

    messages = [decode(data) for data in outbox.collect(0.05)]

    batches = [message for message in messages if isinstance(message, Batch)]
    parts = [message for message in messages if isinstance(message, Snapshot)]
    assert [batch.sequence for batch in batches] == list(range(2, 2 + len(batches)))
    assert {part.sequence for part in parts} == {batches[-1].sequence}
    assert [part.part for part in parts] == list(range(parts[0].parts))
    assert len(parts) > 1
    assert sum(len(part.events) for part in parts) == 3000


def test_notice_goes_out_at_once_and_in_later_snapshots() -> None:
    """A replica that starts later learns of it, for as long as it matters."""
    outbox = started()
    notice = EngineLost(0.01, "f", "10.0.0.2:30000")
    outbox.publish(notice)
    written = (write_notice(notice),)
    assert [decode(data) for data in outbox.collect(0.02)] == [Batch("a", 2, 0.02, (), written)]

    outbox.send_snapshot()
    assert decode(outbox.collect(0.04)[-1]) == Snapshot("a", 3, 0.04, 0, 1, (), written)
    outbox.send_snapshot()
    over = 0.01 + REPEATED[EngineLost]
    assert decode(outbox.collect(over)[-1]) == Snapshot("a", 4, over, 0, 1, ())
