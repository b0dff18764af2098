"""Waiting for what others do."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(probe: Callable[[], T], seconds: float = 10.0) -> T:
    """Wait until a probe gives something that is true, and return that. What takes long is asked for less often."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not (found := probe()):
        assert time.monotonic() < deadline, f"{probe} gave {found!r} for {seconds} s"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
    return found
