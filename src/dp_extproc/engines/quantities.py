"""The one door for numbers from engines' pages: finite, not negative, below 2**53, and what their unit allows.

Whatever passes can be added up, compared and divided without an error and without an infinity. Anything else refuses
the reading, as any other page that cannot be used; whoever watches the engine says so once.
"""

import math
from typing import Annotated, Final

from msgspec import Meta

from dp_extproc.engines.pages import wrong_shape

LIMIT: Final = 1 << 53
"""No count of tokens comes near; below it integers and floating point agree."""

MAX_RANKS: Final = 4096
"""No server is that large; a number beyond it is a mistake, and would be paid for in memory."""

Count = Annotated[int, Meta(ge=0, lt=LIMIT)]
"""Of tokens, requests or steps, in JSON."""

SignedCount = Annotated[int, Meta(gt=-LIMIT, lt=LIMIT)]
"""A count that SGLang gets by subtraction (``pool_stats_observer.py``: the pool, less what is free, less what can be
evicted). It can be below zero, and stands for none then: see :func:`at_least_zero`."""

Amount = Annotated[float, Meta(ge=0, lt=LIMIT)]
"""Of seconds, or of tokens per second, in JSON."""

Rank = Annotated[int, Meta(ge=0, lt=1_000_000)]
Ranks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Port = Annotated[int, Meta(ge=1, le=65535)]


def at_least_zero(count: int | None) -> int | None:
    """Take a :data:`SignedCount` below zero for none."""
    return None if count is None else max(0, count)


def amount(value: float, page: str, name: str) -> float:
    """Let a number through that no reader of JSON has checked.

    Args:
        value: Whatever the page says.
        page: Where it stands, and ...
        name: ... what it is, for the message.

    Raises:
        ReaderError: It is negative, infinite, no number, or too large.
    """
    if not 0 <= value < LIMIT:  # NaN is not
        raise impossible(value, page, name)
    return value


def count(value: float, page: str, name: str) -> int:
    """Likewise for a number of things; those that pages print as floating point are rounded.

    Raises:
        ReaderError: As above.
    """
    return round(amount(value, page, name))


def signed_count(value: float, page: str, name: str) -> int:
    """Likewise for a :data:`SignedCount`.

    Raises:
        ReaderError: It is infinite, no number, or too large.
    """
    return count(max(0.0, value) if value > -LIMIT else value, page, name)


def whole(value: float, page: str, name: str) -> float:
    """Likewise for a number of things that cannot be in parts, and is calculated with in floating point.

    Raises:
        ReaderError: As above, or there is a part of one.
    """
    if amount(value, page, name) != math.floor(value):
        raise impossible(value, page, name)
    return float(value)


def share(value: float, page: str, name: str) -> float:
    """Likewise for a part of a whole.

    Raises:
        ReaderError: It is not between 0 and 1.
    """
    if not 0 <= value <= 1:
        raise impossible(value, page, name)
    return value


def impossible(value: object, page: str, name: str) -> Exception:
    """Make the error for a number that cannot be."""
    return wrong_shape(f"{page} says {str(value)[:20]} for {name}, which cannot be")
