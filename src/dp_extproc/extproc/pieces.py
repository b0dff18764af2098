"""The pieces of a response in full duplex: a reply is made of the bytes of its message, which is not parsed.

A gateway that sends response bodies has a message for each event of a stream. So the cost of such a message counts more
than that of others. ``HttpBody`` in a message and ``StreamedBodyResponse`` in a reply have the same fields, with the
same numbers. So a reply is the body as it came, in another frame.
"""

from functools import lru_cache
from typing import Final

_RESPONSE_BODY: Final = 5 << 3 | 2
"""Key of ``ProcessingRequest.response_body`` (field 5, wire type 2), by which such a message begins."""
_LEAST_BESIDE: Final = 8
"""The least number of a field that may stand beside the body: metadata, attributes, and what later versions add. Fields
of lower numbers are other kinds of messages."""
_FRAMES: Final = 0x1A, 0x1A, 0x0A, 0x22
"""Keys of ``BodyMutation.streamed_response``, ``CommonResponse.body_mutation``, ``BodyResponse.response`` and
``ProcessingResponse.response_body``, from the inside out."""
_NUMBER_BITS: Final = 70
"""Bits of the longest number, which has ten bytes. Without a bound, a message of such bytes alone takes minutes."""
_KNOWN_LENGTHS: Final = 4096
"""Lengths of bodies whose frame is kept, of 20 bytes each. Events of a stream differ by few bytes."""


def pass_piece(message: bytes) -> bytes | None:
    """Write the reply that passes on a piece of a response.

    Args:
        message: A serialised ProcessingRequest.

    Returns:
        A serialised ProcessingResponse; None if the message is none with a piece of a response alone, so that it has to
        be parsed.
    """
    try:
        if message[0] != _RESPONSE_BODY:
            return None
        length, start = message[1], 2
        if length > 0x7F:
            length, start = _read_number(message, 1)
        end = start + length
        if end != len(message) and not _stands_beside(message, end):
            return None
    except IndexError:  # the message is cut off, or none
        return None
    return _frame(length) + message[start:end]


def _stands_beside(message: bytes, at: int) -> bool:
    """Check that the fields from *at* on do not change the kind of the message.

    Raises:
        IndexError: A field is cut off.
    """
    while at < len(message):
        key, at = _read_number(message, at)
        value, at = _read_number(message, at)
        match key & 7:
            case 2:
                at += value
            case 0:
                pass
            case _:
                return False
        if key >> 3 < _LEAST_BESIDE:
            return False
    return at == len(message)


def _read_number(message: bytes, at: int) -> tuple[int, int]:
    """Read a number of variable length, and return it with the place behind it.

    Raises:
        IndexError: It is cut off, or longer than the numbers of protobuf are.
    """
    number = 0
    for shift in range(0, _NUMBER_BITS, 7):
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte <= 0x7F:
            return number, at
    raise IndexError


@lru_cache(_KNOWN_LENGTHS)
def _frame(length: int) -> bytes:
    """Write what stands before a body of so many bytes."""
    frame = b""
    for key in _FRAMES:
        frame = bytes((key, *_number(length + len(frame)))) + frame
    return frame


def _number(value: int) -> list[int]:
    found = []
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return [*found, value]
