"""What replicas tell each other, and how it is written: four bytes of magic and version, then msgpack.

Moments are readings of the sender's own clock, and every message tells that clock at sending. Only differences of the
two mean anything to a receiver, so clocks of different machines are never compared.

Additions go to the end of a struct with a default and are understood across releases. Anything else raises VERSION:
replicas of different versions do not hear each other, and each says so.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from dp_extproc.placement.dispatch import Dispatch
from dp_extproc.request.prefix import NO_PREFIX

VERSION: Final = 1
_MAGIC: Final = b"dpx"
_HEADER: Final = _MAGIC + bytes([VERSION])

MOST_BYTES: Final = 100_000
"""Of the events of a message. A Unix datagram may have what the sender's socket holds: 212,992 by Linux's default
(``net.core.wmem_default``), less the kernel's own overhead."""

_Number = Annotated[int, Meta(ge=0)]


class Dispatched(Struct, frozen=True, array_like=True, tag=0):
    """An attempt has begun."""

    attempt: _Number
    """Unique in the life of its replica."""
    at: float
    dispatch: Dispatch


class PrefillAnswered(Struct, frozen=True, array_like=True, tag=1):
    """Its prompt is computed."""

    attempt: _Number
    at: float


class FirstToken(Struct, frozen=True, array_like=True, tag=2):
    """Its answer has begun."""

    attempt: _Number
    at: float


class Ended(Struct, frozen=True, array_like=True, tag=3):
    """It is over."""

    attempt: _Number
    at: float


Event = Dispatched | PrefillAnswered | FirstToken | Ended


class Batch(Struct, frozen=True, array_like=True, tag=0):
    """What has happened since the batch before. An empty one says that its replica lives."""

    replica: str
    sequence: _Number
    """1, 2, 3, and so on: a receiver sees what it has missed."""
    now: float
    events: tuple[Event, ...]


class Snapshot(Struct, frozen=True, array_like=True, tag=1):
    """A part of all open attempts of a replica, as they stood after the batch of that sequence number."""

    replica: str
    sequence: _Number
    now: float
    part: _Number
    parts: _Number
    events: tuple[Event, ...]
    """Of each open attempt, what has happened to it."""


class Ask(Struct, frozen=True, array_like=True, tag=2):
    """A replica wants a snapshot."""

    replica: str
    """That wants it."""
    of: str | None
    """The one to answer; None stands for all."""


Message = Batch | Snapshot | Ask


class Unreadable(Enum):
    """Why a message was not understood."""

    GARBAGE = "garbage"
    OTHER_VERSION = "other_version"


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Write a message."""
    return _HEADER + _encoder.encode(message)


def decode(data: bytes) -> Message | Unreadable:
    """Read a message, or tell why it cannot be read."""
    if not data.startswith(_MAGIC):
        return Unreadable.GARBAGE
    if not data.startswith(_HEADER):
        return Unreadable.OTHER_VERSION
    try:
        return _decoder.decode(memoryview(data)[len(_HEADER) :])
    except msgspec.MsgspecError:
        return Unreadable.GARBAGE


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
    demand = replace(event.dispatch.demand, prefix=NO_PREFIX, session=None)
    return replace(event, dispatch=replace(event.dispatch, demand=demand))
