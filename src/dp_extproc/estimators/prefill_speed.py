"""The prefill speed of one step group, by what its engine reports of its own steps.

``/v1/loads`` counts the prompt tokens that each rank has computed, and the time of the steps in which it did. So the
quotient is what the engine needs per token, without the time for which requests wait, for decode or on the network.
"""

from collections.abc import Sequence
from typing import Final

from dp_extproc.engines.model import PrefillSteps
from dp_extproc.estimators.decode_pace import ALIKE, within

ATTENTION_TOKENS: Final = 1 << 16
"""Tokens of context with which a prompt token takes twice as long as without: attention grows with the context. It is
about 60,000 for models of 8 and of 70 billion parameters."""
_MEMORY: Final = 60.0
"""Seconds of steps after which older ones count for a half. Simulated, the slowness of an engine is within a tenth of
the true one after 10."""
_HALF_WEIGHT: Final = 2.0
"""Seconds of steps with which a slowness counts for a half."""
_ODD_SLOWNESS: Final = 4.0
"""Bound on the slowness against the average of the pool."""
_START: Final = 5.0
"""Bound on the seconds of steps for which the counts since the start of the engine stand. They contain its warm-up."""


class PrefillSpeed:
    """Seconds per prompt token."""

    __slots__ = ("_before", "seconds", "tokens")

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds of the steps behind the mean; older ones count less."""
        self.tokens = 0.0
        """Prompt tokens that these steps have computed."""
        self._before: PrefillSteps | None = None
        """The counts of the last page."""

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds for which a rank is in steps, per prompt token of its own; None while no step was counted."""
        return self.seconds / self.tokens if self.tokens > 0 and self.seconds > 0 else None

    def learn(self, counts: PrefillSteps) -> None:
        """Learn from the counts since the start of the engine, as means of its ranks. Lower counts began anew."""
        before, self._before = self._before, counts
        if before is None or counts.tokens < before.tokens or counts.seconds < before.seconds:
            if self.tokens == 0 and counts.seconds > 0:
                share = min(1.0, _START / counts.seconds)
                self.seconds, self.tokens = share * counts.seconds, share * counts.tokens
            return
        self.seconds += counts.seconds - before.seconds
        self.tokens += counts.tokens - before.tokens
        if self.seconds > _MEMORY:
            self.seconds /= 2
            self.tokens /= 2


def compare_speeds(speeds: Sequence[PrefillSpeed]) -> list[float]:
    """Return for each engine of a pool how many times longer than the average it takes for a prompt token.

    An engine that counts no steps is taken for an average one.
    """
    tokens = sum(each.tokens for each in speeds)
    seconds = sum(each.seconds for each in speeds)
    if not tokens or not seconds:
        return [1.0] * len(speeds)
    slow = []
    for each in speeds:
        slowness = within((each.seconds_per_token or seconds / tokens) * tokens / seconds, 1.0, _ODD_SLOWNESS)
        slowness **= each.seconds / (each.seconds + _HALF_WEIGHT)
        slow.append(slowness / within(slowness, 1.0, ALIKE))
    return slow
