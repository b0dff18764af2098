"""Compute the share of prompt tokens that a rank finds in its prefix cache, as SGLang does."""

from collections import deque
from typing import Final

WINDOW: Final = 15.0
"""Seconds; ``SGLANG_CACHE_HIT_RATE_WINDOW_SECONDS``."""


class HitRate:
    """The rate of the last prefill batch, and the rate of a recent while. Both stay until the next batch."""

    def __init__(self, window: float = WINDOW) -> None:
        """Start at 0.

        Args:
            window: How long a batch counts as recent, in seconds.
        """
        self.last = 0.0
        self.recent = 0.0
        self._window = window
        self._batches: deque[tuple[float, int, int]] = deque()
        self._found = 0
        self._all = 0

    def add(self, found: int, computed: int, now: float) -> None:
        """Count a batch, of at least one token."""
        self.last = found / (found + computed)
        self._batches.append((now, found, found + computed))
        self._found += found
        self._all += found + computed
        while self._batches[0][0] <= now - self._window:
            _, found, tokens = self._batches.popleft()
            self._found -= found
            self._all -= tokens
        self.recent = self._found / self._all
