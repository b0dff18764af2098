"""Waiting until a server of the test bed is as far as it has to be."""

import time
from collections.abc import Callable
from typing import Final

import httpx

_PAUSE: Final = 0.02


def wait_until(
    is_so: Callable[[], bool],
    seconds: float,
    complaint: Callable[[], str],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until something is so. A server that does not answer may yet do so.

    Args:
        is_so: Asks; it may raise anything but httpx.TransportError to give up at once.
        seconds: To wait at most.
        complaint: Tells what there is instead, for the error.
        pause: Sleeps for so many seconds between two questions; it may raise anything to give up.

    Raises:
        RuntimeError: It is not so in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if is_so():
                return
        except httpx.TransportError:
            pass
        pause(_PAUSE)
    raise RuntimeError(complaint())
