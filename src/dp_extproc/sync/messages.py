"""What replicas tell each other, and how it is written: four bytes of magic and version, then msgpack.

Moments are readings of the sender's own clock, and every message tells that clock at sending. Only differences of the
two mean anything to a receiver, so clocks of different machines are never compared.

Whatever comes from the bus is read as a message, or not at all: every number in it is finite, not negative and below
2**53, so that nothing that is told can bring numbers onto the books with which nobody can calculate.

Additions go to the end of a struct with a default and are understood across releases. Anything else raises VERSION:
replicas of different versions do not hear each other, and each says so.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dp_extproc.engines.quantities import Amount, Count
from dp_extproc.load.records import PlacementRecord
from dp_extproc.prefix_cache.blocks import NO_PREFIX

VERSION: Final = 1
_MAGIC: Final = b"dpx"
_HEADER: Final = _MAGIC + bytes([VERSION])

MOST_BYTES: Final = 100_000
"""Of the events of a message. A Unix datagram may have what the sender's socket holds: 212,992 by Linux's default
(``net.core.wmem_default``), less the kernel's own overhead."""
FRAME_BYTES: Final = 1000
"""Of a message around its events; generously."""


class Dispatched(Struct, frozen=True, array_like=True, tag=0):
    """An attempt has begun."""

    attempt: Count
    """Unique in the life of its replica."""
    at: Amount
    dispatch: PlacementRecord


class PrefillAnswered(Struct, frozen=True, array_like=True, tag=1):
    """Its prompt is computed."""

    attempt: Count
    at: Amount


class FirstToken(Struct, frozen=True, array_like=True, tag=2):
    """Its answer has begun."""

    attempt: Count
    at: Amount


class Ended(Struct, frozen=True, array_like=True, tag=3):
    """It is over."""

    attempt: Count
    at: Amount


Event = Dispatched | PrefillAnswered | FirstToken | Ended


class Batch(Struct, frozen=True, array_like=True, tag=0):
    """What has happened since the batch before. An empty one says that its replica lives."""

    replica: str
    sequence: Count
    """1, 2, 3, and so on: a receiver sees what it has missed."""
    now: Amount
    events: tuple[Event, ...]


class Snapshot(Struct, frozen=True, array_like=True, tag=1):
    """A part of all open attempts of a replica, as they stood after the batch of that sequence number."""

    replica: str
    sequence: Count
    now: Amount
    part: Count
    parts: Count
    events: tuple[Event, ...]
    """Of each open attempt, what has happened to it."""

    def __post_init__(self) -> None:
        """Check what other replicas have sent.

        Raises:
            ValueError: There is no such part.
        """
        if self.part >= self.parts:
            raise ValueError("parts are counted from 0")


class Ask(Struct, frozen=True, array_like=True, tag=2):
    """A replica wants a snapshot."""

    replica: str
    """That wants it."""
    of: str | None
    """The one to answer; None stands for all."""


Message = Batch | Snapshot | Ask


class Unreadable(Enum):
    """Why a message was not understood."""

    UNDECODABLE = "undecodable"
    VERSION_MISMATCH = "version_mismatch"


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Write a message."""
    return _HEADER + _encoder.encode(message)


def decode(data: bytes) -> Message | Unreadable:
    """Read a message, or tell why it cannot be read."""
    if not data.startswith(_MAGIC):
        return Unreadable.UNDECODABLE
    if not data.startswith(_HEADER):
        return Unreadable.VERSION_MISMATCH
    if len(data) > MOST_BYTES + FRAME_BYTES:
        return Unreadable.UNDECODABLE
    try:
        return _decoder.decode(memoryview(data)[len(_HEADER) :])
    except (msgspec.MsgspecError, RecursionError):  # the latter of arrays in arrays, thousands deep
        return Unreadable.UNDECODABLE


def portions(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """Divide events, in their order, into as many messages as they need. Without any there is none."""
    if not events:
        return
    if len(_encoder.encode(events)) <= MOST_BYTES:
        yield events
    elif len(events) > 1:
        middle = len(events) // 2
        yield from portions(events[:middle])
        yield from portions(events[middle:])
    else:
        yield [_without_hints(event) for event in events]


def _without_hints(event: Event) -> Event:
    """Leave out what may be of any size. It only tells where prompts are cached; the load stays."""
    if not isinstance(event, Dispatched):
        return event
    cost = replace(event.dispatch.cost, prefix=NO_PREFIX, session=None)
    return replace(event, dispatch=replace(event.dispatch, cost=cost))
