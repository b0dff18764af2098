"""The progress of one scheduler: when it last published its load, and how long it pauses between two times.

From 0.5.13 on, SGLang's HTTP process answers for the load from shared memory. So the page of an engine whose scheduler
hangs still answers, and only the time stamps on it stand still. A scheduler that computes a long step publishes nothing
either, so a pause counts as a standstill only if it is longer than a step of this engine can take.
"""

import math
from typing import Final

_PATIENCE: Final = 3.0
"""How many times longer than expected a step may take. Steps vary with the shapes of their batches, and the first one
of a new shape may have to compile kernels."""
_JITTER: Final = 0.05
"""Seconds by which the time of one publication may differ between two pages: the duration of a read varies."""
_FADING: Final = 0.9
"""Factor of the longest pause at each further publication. A page is read each second, so a pause of a minute is
forgotten after about half a minute."""
_LONGEST: Final = 60.0
"""Bound in seconds on the pauses that are learned. A scheduler that had hung for long would else go unnoticed again."""


class Progress:
    """When a scheduler last published its load, on the clock of the caller."""

    __slots__ = ("_newest", "_pause", "moved_at")

    def __init__(self) -> None:
        self.moved_at = -math.inf
        """When a page with a newer publication than before was read, or a prompt was answered."""
        self._newest = -math.inf
        """The time of the newest publication."""
        self._pause = 0.0
        """The longest pause in seconds between two publications under load. Older ones count less."""

    def published(self, at: float, now: float, *, is_busy: bool) -> None:
        """Note the newest publication on a page that was read at *now*; *is_busy* means that requests are there."""
        if at > self._newest + _JITTER:
            pause = min(now - self.moved_at, _LONGEST) if is_busy and self.moved_at > -math.inf else 0.0
            self._pause = max(pause, _FADING * self._pause)
            self._newest = at
            self.moved_at = max(self.moved_at, now)

    def answered(self, at: float) -> None:
        """Note that the scheduler has computed a prompt."""
        self.moved_at = max(self.moved_at, at)

    def stands_still(self, since: float, step: float, least: float, now: float) -> bool:
        """Return whether the scheduler has paused for longer than its pace explains.

        Args:
            since: When the oldest request came that it has to work on.
            step: Expected seconds of its longest step.
            least: Seconds that any scheduler may pause.
            now: The time for which this is asked.
        """
        return now - max(self.moved_at, since) > max(least, _PATIENCE * step, _PATIENCE * self._pause)
