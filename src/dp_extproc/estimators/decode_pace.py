"""Time per output token (TPOT) of engines: what each reports, by how many steps, and how engines compare.

An engine that is slower than the others of its pool should get less work. But few steps are weak evidence, old steps
were made under another load, and an idle engine makes none. So what an engine reports counts by the steps behind it,
and fades.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from dp_extproc.engines.model import RankSample

DEFAULT_TPOT: Final = 0.03
"""Seconds per output token that are assumed until an engine reports its own."""
ODD_PACE: Final = 4.0
"""Bound on the factor by which a reported TPOT may differ from the usual one."""
ALIKE: Final = 1.1
"""Factor by which the TPOT of engines of one kind may differ by chance. Only what exceeds it is slowness, so that idle
engines share the requests."""
_ODD_SLOWNESS: Final = 2.0
"""Bound on the reported slowness against the average of the pool."""
_CONTRADICTION: Final = 1.5
"""Bound on the factor between the reported slowness and the slowness by the durations of sequences."""
_LEAST_TPOT: Final = 0.001
_MOST_TPOT: Final = 1.0
"""Seconds per output token. A reported TPOT beyond these bounds is wrong."""
_HALF_LIFE: Final = 5.0
"""Seconds after which steps count for a half. Simulated, 2 are as good."""
_FORGOTTEN: Final = 1e-6
"""Steps below which there are none. Halved without end they would become so small that their products are zero."""
_HALF_WEIGHT: Final = 50.0
"""Steps of a rank, made in about two seconds, with which a slowness counts for a half. Simulated, 5 or 20 are as good
for a busy fleet, but make idle engines differ by chance."""
_LOG_INTERVAL: Final = 40.0
"""Steps that a reported rate stands for: SGLang's default of ``--decode-log-interval``."""
_MEMORY: Final = 200
"""Sequences after which older durations fade from the mean."""
_KNOWN_AFTER: Final = 50
"""Sequences that must have ended before their mean duration is used."""


def within(value: float, middle: float, factor: float) -> float:
    """Return the value, or the nearest one that differs from the middle by no more than a factor."""
    return min(middle * factor, max(middle / factor, value))


class DecodePace:
    """Time per output token of one step group."""

    def __init__(self, ranks: int) -> None:
        self._last: list[RankSample | None] = [None] * ranks
        """The last sample of each rank."""
        self._mean = 0.0
        """Seconds per output token; 0 if none were reported."""
        self.steps = 0.0
        """Steps per rank behind the mean; older ones count less."""
        self._sampled_at = -math.inf
        self._duration = 0.0
        """Mean seconds from the first to the last token of a sequence."""
        self._ended = 0
        """Sequences behind that mean."""

    @property
    def reported(self) -> float | None:
        """Seconds per output token, as the engine reports; None if it has not."""
        return self._mean or None

    @property
    def duration(self) -> float | None:
        """Mean seconds that a sequence lasts, by the clock of this process; None while too few have ended.

        Sequences are as long on one engine as on another, so this measures how slow an engine is without its reports.
        """
        return self._duration if self._ended >= _KNOWN_AFTER else None

    def learn(self, position: int, sample: RankSample, at: float) -> None:
        """Learn from a sample of a rank, taken at *at*."""
        passed = at - self._sampled_at
        if passed > 0:
            faded = self.steps * 0.5 ** (passed / _HALF_LIFE)
            self.steps = faded if faded >= _FORGOTTEN else 0.0
            self._sampled_at = at
        earlier, self._last[position] = self._last[position], sample
        if earlier is None or (between := _between(earlier, sample)) is None:
            return
        tpot, steps = between
        self.steps += (share := steps / len(self._last))
        self._mean += (min(_MOST_TPOT, max(_LEAST_TPOT, tpot)) - self._mean) * share / self.steps

    def ended(self, seconds: float) -> None:
        """Learn from a sequence that has taken so many seconds from its first token to its end."""
        self._ended = min(self._ended + 1, _MEMORY)
        self._duration += (seconds - self._duration) / self._ended


def compare(paces: Sequence[DecodePace]) -> tuple[float, list[float]] | None:
    """Compare the engines of a pool and role.

    What an engine reports is bounded by what the others report, and by how long its sequences last.

    Returns:
        The usual seconds per token, and for each engine how many times longer than the average it takes. None if no
        engine has reported its own.
    """
    reported = [each.reported for each in paces if each.reported is not None]
    if not reported:
        return None
    usual = median([*reported, DEFAULT_TPOT])  # of two engines the default decides which one is odd
    known = [within(each.reported or usual, usual, ODD_PACE) for each in paces]
    if not (steps := sum(each.steps for each in paces)):
        return usual, [1.0] * len(paces)
    average = sum(tpot * each.steps for tpot, each in zip(known, paces, strict=True)) / steps
    durations = [each.duration for each in paces if each.duration is not None]
    duration = fmean(durations) if durations else None
    slow = []
    for each, tpot in zip(paces, known, strict=True):
        slowness = within(tpot / average, 1.0, _ODD_SLOWNESS)
        if duration and each.duration is not None:
            slowness = within(slowness, within(each.duration / duration, 1.0, ODD_PACE), _CONTRADICTION)
        slowness **= each.steps / (each.steps + _HALF_WEIGHT)
        slow.append(slowness / within(slowness, 1.0, ALIKE))
    return usual, slow


def _between(earlier: RankSample, sample: RankSample) -> tuple[float, float] | None:
    """Return the seconds per token between two samples of a rank, and in how many steps; None if they have none."""
    if sample.decoded is not None:
        made = None if earlier.decoded is None else sample.decoded.since(earlier.decoded)
        return None if made is None else (made.tpot, made.steps)
    if not earlier.running_requests or not sample.running_requests or not sample.tokens_per_second:
        return None  # a rate that began without sequences contains the pause
    return sample.running_requests / sample.tokens_per_second, _LOG_INTERVAL  # each sequence gets a token in each step
