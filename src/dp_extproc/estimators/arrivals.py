"""The rate at which prompt tokens arrive that engines have to compute.

It is counted per pool, not per engine. So it stays the same when an engine leaves, and when one joins.
"""

import math
from typing import Final

_WINDOW: Final = 60.0
"""Seconds after which an arrival counts for 1/e. A shorter window adds noise, a longer one delays an autoscaler, whose
engines need minutes to start. At 5 requests per second of very uneven lengths the noise is a tenth."""
_LEAST_WINDOW: Final = 10.0
"""Seconds that the first arrivals are averaged over at least, so that one request after the start is no high rate."""


class ArrivalRate:
    """Tokens per second, as a mean that fades exponentially."""

    __slots__ = ("_at", "_begun", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        """The tokens that have arrived, faded as of the last arrival."""
        self._at = -math.inf
        """The time of the last arrival, in seconds."""
        self._begun = math.inf
        """The time of the first arrival, in seconds."""

    def add(self, tokens: float, at: float) -> None:
        """Note tokens that have arrived at a time, which may be before that of other arrivals."""
        self._begun = min(self._begun, at)
        if at >= self._at:
            self._tokens = self._faded(at) + tokens
            self._at = at
        else:
            self._tokens += tokens * math.exp((at - self._at) / _WINDOW)

    def per_second(self, now: float) -> float:
        """Return the mean tokens per second."""
        if not self._tokens:
            return 0.0
        seen = max(_LEAST_WINDOW, now - self._begun)
        return self._faded(now) / (_WINDOW * -math.expm1(-seen / _WINDOW))

    def _faded(self, now: float) -> float:
        return self._tokens * math.exp(min(0.0, self._at - now) / _WINDOW) if self._tokens else 0.0
