"""The messages between replicas, and their encoding: four bytes of magic and version, then msgpack.

1. Moments are readings of the sender's own clock, in seconds, and every message has that clock's reading at sending.
   Receivers use only differences of the two, so clocks of different machines are never compared.
2. Data from the bus is decoded as a message, or refused as a whole. Every number in a message is finite, not negative
   and below 2**53, so that no message makes the load of a rank infinite or undefined.
3. Additions go to the end of a struct, with a default; older and newer releases understand each other then. Any other
   change raises VERSION: replicas of different versions refuse each other's messages, and log it.
4. What concerns no open attempt of the sender is a notice. A new kind of it is a subclass of :class:`Notice` with the
   next tag, in :data:`AnyNotice`. Receivers leave out kinds that they do not read, so that needs no other VERSION.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw, Struct
from msgspec.structs import replace

from dp_extproc.engines.quantities import Amount, Count
from dp_extproc.load.records import PlacementRecord
from dp_extproc.prefix_cache.blocks import NO_PREFIX

VERSION: Final = 1
_MAGIC: Final = b"dpx"
_HEADER: Final = _MAGIC + bytes([VERSION])

MAX_EVENT_BYTES: Final = 100_000
"""Bound the encoded events of a message. A Unix datagram may have what the sender's socket buffers: 212,992 bytes by
Linux's default (``net.core.wmem_default``), less the kernel's own overhead."""
MAX_FRAME_BYTES: Final = 1000
"""Bound the encoded rest of a message; about ten times what it takes."""


class _Event(Struct, frozen=True, array_like=True):
    attempt: Count
    """A number that is unique in the life of the replica."""
    at: Amount


class Placed(_Event, frozen=True, tag=0):
    """An attempt was placed: its reservations are open."""

    record: PlacementRecord


class PrefillAnswered(_Event, frozen=True, tag=1):
    """The prompt of an attempt is computed."""


class FirstToken(_Event, frozen=True, tag=2):
    """The response of an attempt has begun."""


class Ended(_Event, frozen=True, tag=3):
    """An attempt is over."""


Event = Placed | PrefillAnswered | FirstToken | Ended


class Notice(Struct, frozen=True, array_like=True):
    """A fact for all replicas. It may arrive repeatedly, late or not at all, and gets no answer."""

    at: Amount


class EngineLost(Notice, frozen=True, tag=0):
    """An endpoint has dropped the connection of a request that it had accepted."""

    fingerprint: Annotated[str, Meta(max_length=64)]
    """That of the request; see :mod:`dp_extproc.request.fingerprint`."""
    address: Annotated[str, Meta(max_length=64)]
    """``IP:port`` of the endpoint."""


class RequestAborted(Notice, frozen=True, tag=1):
    """A client has ended the requests that it has sent under an id."""

    key: Annotated[str, Meta(max_length=64)]
    """See :func:`dp_extproc.request.client_ids.client_key`."""


AnyNotice = EngineLost | RequestAborted

REPEATED: Final[dict[type[Notice], float]] = {EngineLost: 600.0}
"""Kinds of notices that a snapshot repeats, and for how many seconds. Others are sent once."""
MOST_REPEATED: Final = 1000
"""Bounds the notices that a snapshot repeats; the oldest are left out."""


class Batch(Struct, frozen=True, array_like=True, tag=0):
    """All events of a replica since its batch before. An empty batch is a heartbeat."""

    replica: str
    sequence: Count
    """1, 2, 3, and so on. A receiver detects missing batches by it."""
    now: Amount
    events: tuple[Event, ...]
    notices: tuple[Raw, ...] = ()
    """Encoded notices; :func:`read_notices` decodes them."""


class Snapshot(Struct, frozen=True, array_like=True, tag=1):
    """A part of all open attempts of a replica, as they were after the batch of that sequence number."""

    replica: str
    sequence: Count
    now: Amount
    part: Count
    parts: Count
    events: tuple[Event, ...]
    """The events so far of each open attempt."""
    notices: tuple[Raw, ...] = ()
    """Those of :data:`REPEATED`."""

    def __post_init__(self) -> None:
        """Raise :exc:`ValueError` if there is no such part."""
        if self.part >= self.parts:
            raise ValueError("parts are counted from 0")


class SnapshotRequest(Struct, frozen=True, array_like=True, tag=2):
    """A request for a snapshot."""

    replica: str
    """The replica that sends the request."""
    of: str | None
    """The replica that is to send the snapshot; None for all replicas."""


Message = Batch | Snapshot | SnapshotRequest


class Unreadable(Enum):
    """Why a message could not be decoded."""

    UNDECODABLE = "undecodable"
    VERSION_MISMATCH = "version_mismatch"


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)
_notices: Final[msgspec.msgpack.Decoder[AnyNotice]] = msgspec.msgpack.Decoder(AnyNotice)


def encode(message: Message) -> bytes:
    return _HEADER + _encoder.encode(message)


def decode(data: bytes) -> Message | Unreadable:
    """Decode a message, or return why that is not possible."""
    if not data.startswith(_MAGIC):
        return Unreadable.UNDECODABLE
    if not data.startswith(_HEADER):
        return Unreadable.VERSION_MISMATCH
    if len(data) > MAX_EVENT_BYTES + MAX_FRAME_BYTES:
        return Unreadable.UNDECODABLE
    try:
        return _decoder.decode(memoryview(data)[len(_HEADER) :])
    except (msgspec.MsgspecError, RecursionError):  # the latter of arrays in arrays, thousands deep
        return Unreadable.UNDECODABLE


def write_notice(notice: Notice) -> Raw:
    """Encode a notice, as messages contain it."""
    return Raw(_encoder.encode(notice))


def read_notices(notices: Iterable[Raw]) -> Iterator[AnyNotice]:
    """Decode the notices of a message, but for those of kinds that only a later release has."""
    for notice in notices:
        with suppress(msgspec.MsgspecError, RecursionError):
            yield _notices.decode(notice)


def split_notices(notices: Sequence[Raw]) -> Iterator[tuple[Raw, ...]]:
    """Split notices, in their order, into parts that each fit into a message without events; none need none."""
    part: list[Raw] = []
    size = 0
    for notice in notices:
        length = len(memoryview(notice))
        if part and size + length > MAX_EVENT_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(notice)
        size += length
    if part:
        yield tuple(part)


def split_events(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """Split events, in their order, into parts that each fit into a message; no events need none."""
    if not events:
        return
    if len(_encoder.encode(events)) <= MAX_EVENT_BYTES:
        yield events
    elif len(events) > 1:
        middle = len(events) // 2
        yield from split_events(events[:middle])
        yield from split_events(events[middle:])
    else:
        yield [_without_prefix(event) for event in events]


def _without_prefix(event: Event) -> Event:
    """Remove what may be of any size. It only serves the prefix index; the load of the attempt stays."""
    if not isinstance(event, Placed):
        return event
    cost = replace(event.record.cost, prefix=NO_PREFIX, session=None)
    return replace(event, record=replace(event.record, cost=cost))
