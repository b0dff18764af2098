"""What is collected, and when."""

from dp_extproc.sync.messages import Ask, Batch, Dispatched, Ended, FirstToken, PrefillAnswered, Snapshot, decode
from dp_extproc.sync.outbox import HEARTBEAT, Outbox
from sync.books import DISPATCH, dispatch_to


def started() -> Outbox:
    """Make one that has just said that it lives."""
    outbox = Outbox("a")
    assert [decode(data) for data in outbox.collect(0.0)] == [Batch("a", 1, 0.0, ())]
    return outbox


def test_events_are_told_in_one_batch() -> None:
    """What has happened since the last batch goes out in order, with the clock's reading at sending."""
    outbox = started()
    outbox.opened(7, DISPATCH, 0.01)
    outbox.prefill_answered(7, 0.02)
    outbox.first_token(7, 0.03)
    outbox.ended(7, 0.04)

    (message,) = map(decode, outbox.collect(0.05))

    told = (Dispatched(7, 0.01, DISPATCH), PrefillAnswered(7, 0.02), FirstToken(7, 0.03), Ended(7, 0.04))
    assert message == Batch("a", 2, 0.05, told)
    assert outbox.open_attempts == 0


def test_nothing_is_told_twice() -> None:
    """Without news and before the heartbeat is due, there is no message."""
    outbox = started()
    outbox.opened(7, DISPATCH, 0.01)
    outbox.collect(0.02)

    assert outbox.collect(0.02 + HEARTBEAT / 2) == []


def test_silence_is_broken_by_a_heartbeat() -> None:
    """An empty batch takes a sequence number, by which peers see what they have missed."""
    outbox = started()

    assert [decode(data) for data in outbox.collect(HEARTBEAT)] == [Batch("a", 2, HEARTBEAT, ())]


def test_events_of_unknown_attempts_are_not_told() -> None:
    """What ended once does not end again, and does not go on."""
    outbox = started()
    outbox.opened(7, DISPATCH, 0.01)
    outbox.ended(7, 0.02)
    outbox.collect(0.03)
    outbox.first_token(7, 0.04)
    outbox.ended(7, 0.04)

    assert outbox.collect(0.05) == []


def test_questions_are_sent_once() -> None:
    """Asking the same replica twice before the next messages is one question."""
    outbox = started()
    for of in ("b", "b", None):
        outbox.ask(of)

    assert [decode(data) for data in outbox.collect(0.01)] == [Ask("a", "b"), Ask("a", None)]
    assert outbox.collect(0.02) == []


def test_an_answer_tells_all_that_is_open() -> None:
    """A snapshot follows a batch, whose number it bears, and tells open attempts with what has happened to them."""
    outbox = started()
    for attempt in (1, 2, 3):
        outbox.opened(attempt, dispatch_to(attempt), 0.01)
    outbox.first_token(2, 0.02)
    outbox.collect(0.03)
    outbox.ended(1, 0.04)
    outbox.answer()
    outbox.answer()

    batch, snapshot = map(decode, outbox.collect(0.05))

    assert batch == Batch("a", 3, 0.05, (Ended(1, 0.04),))
    still_open = (Dispatched(2, 0.01, dispatch_to(2)), FirstToken(2, 0.02), Dispatched(3, 0.01, dispatch_to(3)))
    assert snapshot == Snapshot("a", 3, 0.05, 0, 1, still_open)


def test_an_answer_with_nothing_open_says_so() -> None:
    """An empty snapshot is told, too: it ends what peers believe."""
    outbox = started()
    outbox.answer()

    assert [decode(data) for data in outbox.collect(0.01)] == [
        Batch("a", 2, 0.01, ()),
        Snapshot("a", 2, 0.01, 0, 1, ()),
    ]


def test_a_large_answer_comes_in_parts() -> None:
    """A snapshot of thousands of attempts takes several messages, all of one number."""
    outbox = started()
    for attempt in range(3000):
        outbox.opened(attempt, dispatch_to(attempt), 0.01)
    outbox.answer()

    messages = [decode(data) for data in outbox.collect(0.05)]

    batches = [message for message in messages if isinstance(message, Batch)]
    parts = [message for message in messages if isinstance(message, Snapshot)]
    assert [batch.sequence for batch in batches] == list(range(2, 2 + len(batches)))
    assert {part.sequence for part in parts} == {batches[-1].sequence}
    assert [part.part for part in parts] == list(range(parts[0].parts))
    assert len(parts) > 1
    assert sum(len(part.events) for part in parts) == 3000
