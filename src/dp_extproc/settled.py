"""Reads a file that another program may be writing at the moment."""

import asyncio
from collections.abc import Callable
from typing import Final

_SETTLE_SECONDS: Final = 0.05
"""Seconds after which a changed text is read again. It counts only if it is still the same, so no half-written one."""


async def read_settled(read: Callable[[], str], before: str | None) -> str | None:
    """Read a text off the event loop; None if it differs from that *before* and is still being written."""
    text = await asyncio.to_thread(read)
    if text != before:
        await asyncio.sleep(_SETTLE_SECONDS)
        if await asyncio.to_thread(read) != text:
            return None
    return text
