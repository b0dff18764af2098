"""Messages are decoded as they were encoded, and all other data is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix
from dp_extproc.sync.messages import (
    MAX_EVENT_BYTES,
    VERSION,
    Batch,
    Ended,
    EngineLost,
    Event,
    FirstToken,
    Message,
    Placed,
    PrefillAnswered,
    Snapshot,
    SnapshotRequest,
    Unreadable,
    decode,
    encode,
    read_notices,
    split_events,
    split_notices,
    write_notice,
)
from sync.peer_requests import RECORD, record_to

EVENTS: tuple[Event, ...] = (Placed(7, 1.5, RECORD), PrefillAnswered(7, 1.75), FirstToken(7, 1.8), Ended(7, 2.0))


@pytest.mark.parametrize(
    "message",
    [
        Batch("a", 1, 2.5, EVENTS),
        Batch("a", 2, 3.0, ()),
        Snapshot("a", 2, 3.0, 0, 1, EVENTS[:3]),
        SnapshotRequest("a", None),
        SnapshotRequest("a", "b"),
    ],
    ids=["batch", "heartbeat", "snapshot", "ask_all", "ask_one"],
)
def test_message_is_decoded_as_it_was_encoded(message: Message) -> None:
    """Hashes of all 64 bits stay as they are."""
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Unreadable.UNDECODABLE),
        (b"hello", Unreadable.UNDECODABLE),
        (encode(SnapshotRequest("a", None))[:-1], Unreadable.UNDECODABLE),
        (encode(SnapshotRequest("a", None)) + b"x", Unreadable.UNDECODABLE),
        (b"dpx\x01\x93\x00", Unreadable.UNDECODABLE),
        (b"dpx", Unreadable.VERSION_MISMATCH),
        (b"dpx" + bytes([VERSION + 1]) + b"whatever", Unreadable.VERSION_MISMATCH),
    ],
    ids=["nothing", "text", "cut", "longer", "no_message", "no_version", "newer"],
)
def test_decode_returns_why_data_is_refused(data: bytes, expected: Unreadable) -> None:
    """Garbage and messages of another version are values, not errors."""
    assert decode(data) is expected


@pytest.mark.parametrize("ends", [(7,), (5, 0), (0, 0), (5, 3), (-5, 3), (1, 2, 3)])
def test_message_is_garbage_if_prefix_blocks_do_not_fit(ends: tuple[int, ...]) -> None:
    """Such a prefix would break the prefix index of each receiver."""
    plain = msgspec.to_builtins(Batch("a", 1, 2.5, EVENTS[:1]))
    events = plain[1 + Batch.__struct_fields__.index("events")]  # behind the tag
    prefix = events[0][-1]["demand"]["prefix"]
    header = encode(SnapshotRequest("a", None))[:4]
    fits = decode(header + msgspec.msgpack.encode(plain))
    prefix["ends"] = ends

    assert isinstance(fits, Batch)
    assert decode(header + msgspec.msgpack.encode(plain)) is Unreadable.UNDECODABLE


@given(st.binary(max_size=200))
def test_decode_never_raises_after_a_right_header(data: bytes) -> None:
    """All bytes behind it are either a message or garbage."""
    assert isinstance(decode(b"dpx" + bytes([VERSION]) + data), Batch | Snapshot | SnapshotRequest | Unreadable)


def test_events_are_split_in_their_order() -> None:
    """No message is larger than a datagram may be, and none of the events is lost."""
    events: list[Event] = [Placed(number, 0.0, record_to(number)) for number in range(5000)]

    divided = list(split_events(events))

    assert len(divided) > 1
    assert [event for portion in divided for event in portion] == events
    assert all(len(encode(Batch("a", 1, 0.0, tuple(portion)))) < MAX_EVENT_BYTES + 100 for portion in divided)


def test_event_drops_prefix_and_session_if_too_large() -> None:
    """An event that exceeds a message by itself keeps its load."""
    cost = RequestCost(
        5e6, 1.0, Prefix(tuple(range(1 << 60, (1 << 60) + 100_000)), tuple(range(100_000))), "s" * 100_000
    )
    record = PlacementRecord("llama", cost, "http://10.0.0.2:30000", 1)

    ((event,),) = split_events([Placed(1, 0.0, record)])

    assert isinstance(event, Placed)
    assert event.record.cost == RequestCost(5e6, 1.0, NO_PREFIX, None)
    assert event.record.decode_rank == 1


def test_no_events_need_no_message() -> None:
    """Without events there is nothing to split."""
    assert list(split_events([])) == []


LOST = EngineLost(1.5, "0123456789abcdef", "10.0.0.2:30000")
OF_A_LATER_RELEASE = msgspec.Raw(msgspec.msgpack.encode([99, 1.5, {"unknown": 1}]))
WRONG = msgspec.Raw(msgspec.msgpack.encode([0, -1.0, "f", "a"]))


def test_notice_is_read_beside_those_of_unknown_kinds() -> None:
    """A later release may publish kinds of notices that this one does not read, without any loss of load."""
    message = Batch("a", 1, 2.5, EVENTS, (OF_A_LATER_RELEASE, write_notice(LOST), WRONG))

    decoded = decode(encode(message))

    assert isinstance(decoded, Batch)
    assert decoded.events == EVENTS
    assert list(read_notices(decoded.notices)) == [LOST]


@pytest.mark.parametrize("message", [Batch("a", 1, 2.5, EVENTS), Snapshot("a", 2, 3.0, 0, 1, EVENTS[:3])])
def test_message_without_notices_is_read_from_an_older_release(message: Message) -> None:
    """An older release ends its messages with the events."""
    older = msgspec.msgpack.encode(msgspec.to_builtins(message)[:-1])

    assert decode(encode(message)[:4] + older) == message


def test_notices_are_split_in_their_order() -> None:
    """No message is larger than a datagram may be, and none of the notices is lost."""
    notices = [write_notice(EngineLost(float(number), "f" * 32, "10.0.0.2:30000")) for number in range(5000)]

    divided = list(split_notices(notices))

    assert len(divided) > 1
    assert [notice for part in divided for notice in part] == notices
    assert all(len(encode(Batch("a", 1, 0.0, (), part))) < MAX_EVENT_BYTES + 100 for part in divided)
