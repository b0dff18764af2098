"""What is written is read again, and nothing else is."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix
from dp_extproc.sync.messages import (
    MOST_BYTES,
    VERSION,
    Ask,
    Batch,
    Dispatched,
    Ended,
    Event,
    FirstToken,
    Message,
    PrefillAnswered,
    Snapshot,
    Unreadable,
    decode,
    encode,
    portions,
)
from sync.books import DISPATCH, dispatch_to

EVENTS: tuple[Event, ...] = (Dispatched(7, 1.5, DISPATCH), PrefillAnswered(7, 1.75), FirstToken(7, 1.8), Ended(7, 2.0))


@pytest.mark.parametrize(
    "message",
    [
        Batch("a", 1, 2.5, EVENTS),
        Batch("a", 2, 3.0, ()),
        Snapshot("a", 2, 3.0, 0, 1, EVENTS[:3]),
        Ask("a", None),
        Ask("a", "b"),
    ],
    ids=["batch", "heartbeat", "snapshot", "ask_all", "ask_one"],
)
def test_every_message_survives_the_way(message: Message) -> None:
    """A message is read as it was written, hashes of all 64 bits included."""
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Unreadable.UNDECODABLE),
        (b"hello", Unreadable.UNDECODABLE),
        (encode(Ask("a", None))[:-1], Unreadable.UNDECODABLE),
        (encode(Ask("a", None)) + b"x", Unreadable.UNDECODABLE),
        (b"dpx\x01\x93\x00", Unreadable.UNDECODABLE),
        (b"dpx", Unreadable.VERSION_MISMATCH),
        (b"dpx" + bytes([VERSION + 1]) + b"whatever", Unreadable.VERSION_MISMATCH),
    ],
    ids=["nothing", "text", "cut", "longer", "no_message", "no_version", "newer"],
)
def test_what_cannot_be_read_is_told_apart(data: bytes, expected: Unreadable) -> None:
    """Garbage and messages of another version are values, not errors."""
    assert decode(data) is expected


@pytest.mark.parametrize("ends", [(7,), (5, 0), (0, 0), (5, 3), (-5, 3), (1, 2, 3)])
def test_a_prompt_whose_blocks_do_not_fit_is_garbage(ends: tuple[int, ...]) -> None:
    """It would break the books of whoever heard it, so it is refused before."""
    told = msgspec.to_builtins(Batch("a", 1, 2.5, EVENTS[:1]))
    prefix = told[-1][0][-1]["demand"]["prefix"]
    header = encode(Ask("a", None))[:4]
    fits = decode(header + msgspec.msgpack.encode(told))
    prefix["ends"] = ends

    assert isinstance(fits, Batch)
    assert decode(header + msgspec.msgpack.encode(told)) is Unreadable.UNDECODABLE


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """Whatever comes after a right header is either a message or garbage."""
    assert isinstance(decode(b"dpx" + bytes([VERSION]) + data), Batch | Snapshot | Ask | Unreadable)


def test_many_events_are_divided_in_their_order() -> None:
    """No message is larger than a datagram may be, and none of the events is left out."""
    events: list[Event] = [Dispatched(number, 0.0, dispatch_to(number)) for number in range(5000)]

    divided = list(portions(events))

    assert len(divided) > 1
    assert [event for portion in divided for event in portion] == events
    assert all(len(encode(Batch("a", 1, 0.0, tuple(portion)))) < MOST_BYTES + 100 for portion in divided)


def test_a_hint_that_is_too_large_is_left_out() -> None:
    """An event that exceeds a message by itself is told without the prefix and the session; its load is told."""
    demand = RequestCost(
        5e6, 1.0, Prefix(tuple(range(1 << 60, (1 << 60) + 100_000)), tuple(range(100_000))), "s" * 100_000
    )
    dispatch = PlacementRecord("llama", demand, "http://10.0.0.2:30000", 1)

    ((event,),) = portions([Dispatched(1, 0.0, dispatch)])

    assert isinstance(event, Dispatched)
    assert event.dispatch.cost == RequestCost(5e6, 1.0, NO_PREFIX, None)
    assert event.dispatch.decode_rank == 1


def test_nothing_takes_no_message() -> None:
    """Without events there is nothing to divide."""
    assert list(portions([])) == []
