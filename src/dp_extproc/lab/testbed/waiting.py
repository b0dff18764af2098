"""Wait for a condition of a process of the test bed."""

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
    """Wait until a condition holds. A process that does not answer yet counts as false.

    Args:
        is_so: The condition; it may raise anything but httpx.TransportError to give up at once.
        seconds: Seconds to wait at most.
        complaint: Describes the state for the error.
        pause: Sleeps for so many seconds between two checks; it may raise anything to give up.

    Raises:
        RuntimeError: The condition does not hold in time.
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
