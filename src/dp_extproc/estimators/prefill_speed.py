"""The prefill speed of one step group, by what its engine reports of its own steps.

``/v1/loads`` counts the prompt tokens that each rank has computed, and the time of the steps in which it did. So the
quotient is what the engine needs per token, without the time for which requests wait, for decode or on the network.
"""

from typing import Final

from dp_extproc.engines.model import PrefillSteps

_MEMORY: Final = 60.0
"""Seconds of steps after which older ones count for a half. Simulated, the slowness of an engine is within a tenth of
the true one after 10."""
_START: Final = 5.0
"""Bound on the seconds of steps for which the counts since the start of the engine stand. They contain its warm-up."""


class PrefillSpeed:
    """Seconds per prompt token."""

    __slots__ = ("_before", "_tokens", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds of the steps behind the mean; older ones count less."""
        self._tokens = 0.0
        self._before: PrefillSteps | None = None
        """The counts of the last page, added up over the ranks."""

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds for which a rank is in steps, per prompt token of its own; None while no step was counted."""
        return self.seconds / self._tokens if self._tokens > 0 and self.seconds > 0 else None

    def learn(self, counts: PrefillSteps) -> None:
        """Learn from the counts since the start of the engine, added up over the ranks. Lower counts began anew."""
        before, self._before = self._before, counts
        if before is None or counts.tokens < before.tokens or counts.seconds < before.seconds:
            if self._tokens == 0 and counts.seconds > 0:
                share = min(1.0, _START / counts.seconds)
                self.seconds, self._tokens = share * counts.seconds, share * counts.tokens
            return
        self.seconds += counts.seconds - before.seconds
        self._tokens += counts.tokens - before.tokens
        if self.seconds > _MEMORY:
            self.seconds /= 2
            self._tokens /= 2
