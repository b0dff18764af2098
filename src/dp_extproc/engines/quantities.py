"""Checks every number of an engine's page: finite, not negative, below 2**53, and as its unit allows.

Numbers that pass can be added, compared and divided without an exception and without an infinity. Any other number
makes the whole page unusable, like any other malformed page; the failure is then logged once.

msgspec checks numbers in JSON by the annotated types. The functions check all others: they take a number, its page and
its name there for the message, and raise :class:`dp_extproc.engines.pages.ReaderError`.
"""

import math
from typing import Annotated, Final

from msgspec import Meta

from dp_extproc.engines.pages import wrong_shape

LIMIT: Final = 1 << 53
"""Bound of all numbers. Below it integers and floating point agree; no count of tokens comes near it."""

MAX_RANKS: Final = 4096
"""Bound of the number of DP ranks, because each one costs memory. No engine comes near it."""

Count = Annotated[int, Meta(ge=0, lt=LIMIT)]
"""A number of tokens, requests or steps in JSON."""

SignedCount = Annotated[int, Meta(gt=-LIMIT, lt=LIMIT)]
"""A count that SGLang computes by subtraction (``pool_stats_observer.py``: the pool, less the free tokens, less those
that can be evicted). It can be below zero, and stands for zero then; see :func:`at_least_zero`."""

Amount = Annotated[float, Meta(ge=0, lt=LIMIT)]
"""A number of seconds, or of tokens per second, in JSON."""

Rank = Annotated[int, Meta(ge=0, lt=1_000_000)]
Ranks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Port = Annotated[int, Meta(ge=1, le=65535)]


def at_least_zero(count: int | None) -> int | None:
    """Raise a :data:`SignedCount` to zero at least."""
    return None if count is None else max(0, count)


def amount(value: float, page: str, name: str) -> float:
    """Check an :data:`Amount`."""
    if not 0 <= value < LIMIT:  # NaN is not
        raise impossible(value, page, name)
    return value


def count(value: float, page: str, name: str) -> int:
    """Check a :data:`Count`, and round it: some pages print counts as floating point."""
    return round(amount(value, page, name))


def signed_count(value: float, page: str, name: str) -> int:
    """Check a :data:`SignedCount`, and raise it to zero at least."""
    return count(max(0.0, value) if value > -LIMIT else value, page, name)


def whole(value: float, page: str, name: str) -> float:
    """Check that a count is whole, and keep it in floating point."""
    if amount(value, page, name) != math.floor(value):
        raise impossible(value, page, name)
    return float(value)


def share(value: float, page: str, name: str) -> float:
    """Check that a share of a whole is between 0 and 1."""
    if not 0 <= value <= 1:
        raise impossible(value, page, name)
    return value


def impossible(value: object, page: str, name: str) -> Exception:
    """Make the error for an impossible number."""
    return wrong_shape(f"{page} says {str(value)[:20]} for {name}, which cannot be")
