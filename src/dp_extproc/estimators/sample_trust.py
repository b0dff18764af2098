"""Sample trust: how far an engine's samples may correct the external load, by how far earlier corrections held.

External load changes slowly, compared with the time between two samples. The next sample confirms a true correction: it
corrects little, or once more in the same direction if the first correction was applied in part. An engine that reports
nonsense, or whose samples mix two moments, has each correction taken back by the next one. So a correction in the
direction of the one before raises the trust, and any other one lowers it.
"""

import math
from typing import Final

_PACE: Final = 0.5
"""Change of the trust's logarithm per sample of a whole engine. Simulated with engines that report nonsense, on 2
decode engines of 8 ranks, the TPOT is below that of the engines' own picks by 0.0 % with full trust, by 7.5 % with 0.25
and by 7.9 % with 0.5; with 30 % of external traffic by 6.4, 6.7 and 6.8 %."""
_PERSISTENT: Final = 0.2
"""Likeness of successive corrections above which the trust grows. With 0.0 the trust in nonsense stays at about 0.15,
and the gain is 3.6 % (with a change of 0.25 per sample); with 0.1 it is 6.1 %."""
_LEAST: Final = 0.03
"""Trust below which no engine falls, so that a load which is reported long enough prevails."""
_SAMPLES: Final = 6.0
"""Samples of a whole engine over which the usual size of corrections is averaged."""
_SURPRISE: Final = 3.0
"""Bound on the likeness of one pair of corrections, their product divided by the mean square."""


class SampleTrust:
    """The trust in the samples of one step group."""

    def __init__(self, ranks: int) -> None:
        self.share = 1.0
        """Share of a correction that is applied; all of it until corrections are taken back."""
        self._before = [0.0] * ranks
        """The last correction of each rank, in tokens."""
        self._square = 0.0
        """The mean square of the corrections."""

    def weigh(self, position: int, correction: float, *, is_empty: bool = False) -> float:
        """Adjust the trust by a correction of a rank, in tokens, and return the part of it that is applied.

        A sample without any load is no estimate, so that its correction is applied completely.
        """
        ranks = len(self._before)
        before, self._before[position] = self._before[position], correction
        self._square += (correction * correction - self._square) / (_SAMPLES * ranks)
        if before and correction and self._square:  # the square of a very small correction is zero
            alike = max(-_SURPRISE, min(_SURPRISE, correction * before / self._square))
            share = self.share * math.exp(_PACE / ranks * (alike - _PERSISTENT))
            self.share = max(_LEAST, min(1.0, share))
        return correction if is_empty else self.share * correction
