"""Keep steps as long as they should be, also when they are shorter than the resolution of a timer."""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

_TIMER: Final = 0.001
"""Resolution of uvloop's timers; shorter waits are saved up."""
_LAG: Final = 0.05
"""Seconds that a busy machine may be late; a longer delay is not made up for."""


@dataclass(slots=True)
class Pace:
    """Keep a series of steps on time."""

    lost: float = 0.0
    """Seconds by which steps were late and that have not been made up for: the machine was too busy."""
    _due: float | None = None

    async def step(self, seconds: float) -> None:
        """Wait until a step of this length is over; it began when the last one was due to end."""
        now = time.monotonic()
        due = now if self._due is None else self._due
        lost = max(0.0, now - _LAG - due)
        self.lost += lost
        self._due = due + lost + seconds
        await asyncio.sleep(self._due - now if self._due - now >= _TIMER else 0)

    def rest(self) -> None:
        """Start anew: the next step begins when it is called."""
        self._due = time.monotonic()
