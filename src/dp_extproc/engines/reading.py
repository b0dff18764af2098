"""What the readers of engine pages share: one error, and JSON that never raises another."""

from typing import TypeVar

import msgspec

from dp_extproc.engines.listener import FailureKind

Shape = TypeVar("Shape")


class ReaderError(Exception):
    """A page cannot be used. ``kind`` tells malformed from well-formed but foreign."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def wrong_shape(message: str) -> ReaderError:
    """Make the error for a page that is well-formed but not SGLang's."""
    return ReaderError(FailureKind.WRONG_SHAPE, message)


def unreadable(message: str) -> ReaderError:
    """Make the error for a page that is not even well-formed."""
    return ReaderError(FailureKind.UNREADABLE, message)


def read_json(page: bytes, shape: type[Shape], name: str, *, of: str = "SGLang") -> Shape:
    """Decode *page*, which is called *name* in messages, as *shape*. It should be of this kind of engine.

    Raises:
        ReaderError: It is not JSON, or not of that shape.
    """
    try:
        return msgspec.json.decode(page, type=shape)
    except msgspec.ValidationError as error:
        raise wrong_shape(f"{name} is not {of}'s: {error}") from None
    except (ValueError, RecursionError) as error:  # DecodeError and UnicodeDecodeError are ValueErrors
        raise unreadable(f"{name} is not JSON: {error}") from None
