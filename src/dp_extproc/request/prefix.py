"""Stub by the lead: names that placement uses. The prefix helper replaces this file."""

from typing import Any, Final

from msgspec import Struct


class Prefix(Struct, frozen=True):
    """What a prompt begins with."""

    blocks: tuple[int, ...] = ()


NO_PREFIX: Final = Prefix()


def prefix_of(_request: Any) -> Prefix:
    return NO_PREFIX
