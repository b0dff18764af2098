"""How fast servers make tokens: what each tells, how much there is behind it, and how they compare.

A server that is slower than its peers should get less. But a few steps say little, steps of a while ago were made under
another load, and who gets nothing tells nothing; so what a server tells counts by the steps behind it, and fades.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from dp_extproc.engines.model import RankSample

DEFAULT_TPOT: Final = 0.03
"""Seconds per output token, until an engine tells how fast it is."""
ODD_PACE: Final = 4.0
"""How many times faster or slower than usual a server may call itself."""
ALIKE: Final = 1.1
"""How many times slower or faster than average is no difference: idle servers of one kind share what comes, though
their counts are never quite the same. What is more counts from there on, so that nothing jumps at the edge."""
_ODD_SLOWNESS: Final = 2.0
"""How many times slower or faster than its pool's average a server may seem, while our own clock has nothing to set
against it ..."""
_CONTRADICTION: Final = 1.5
"""... and than our own clock shows it to be, once that has."""
_LEAST_TPOT: Final = 0.001
_MOST_TPOT: Final = 1.0
"""Seconds; what an engine tells beyond is told wrong."""
_HALF_LIFE: Final = 5.0
"""Seconds after which steps count for half. Simulated, 2 are as good."""
_FORGOTTEN: Final = 1e-6
"""Steps that are none any more. Halved on and on they would become the smallest numbers there are, of which the
products are zero."""
_TELLING: Final = 50.0
"""Steps of a rank whose pace is believed by half; those of two seconds. Simulated, 5 or 20 are as good for a fleet that
is busy; idle servers are told apart by chance then."""
_LOG_INTERVAL: Final = 40.0
"""Steps after which SGLang tells a rate, unless configured otherwise (``--decode-log-interval``)."""
_MEMORY: Final = 200
"""Sequences, after which how long they lasted fades from the mean."""
_KNOWN_AFTER: Final = 50
"""Sequences that must have ended for their mean to say something."""


def within(value: float, middle: float, factor: float) -> float:
    """Give the value, or the nearest that is no more than a factor from the middle."""
    return min(middle * factor, max(middle / factor, value))


class DecodePace:
    """How fast one server, or a group of its ranks with a common step, makes tokens."""

    __slots__ = ("_ended", "_last", "_lasted", "_mean", "_sampled_at", "steps")

    def __init__(self, ranks: int) -> None:
        self._last: list[RankSample | None] = [None] * ranks
        """The sample of each rank that was learned from last."""
        self._mean = 0.0
        self.steps = 0.0
        """Those behind what was told, per rank; older ones count less."""
        self._sampled_at = -math.inf
        self._lasted = 0.0
        """Seconds from the first to the last token, as a mean ..."""
        self._ended = 0
        """... of so many sequences."""

    @property
    def told(self) -> float | None:
        """Seconds per output token by the engine's own account, if it has told."""
        return self._mean or None

    @property
    def lasting(self) -> float | None:
        """Seconds that a sequence lasts here, by our own clock; None while too few have ended.

        Sequences are as long on one server as on another, so this tells how slow a server is without its own word.
        """
        return self._lasted if self._ended >= _KNOWN_AFTER else None

    def learn(self, position: int, sample: RankSample, at: float) -> None:
        """Learn from what a rank told of a moment."""
        passed = at - self._sampled_at
        if passed > 0:
            faded = self.steps * 0.5 ** (passed / _HALF_LIFE)
            self.steps = faded if faded >= _FORGOTTEN else 0.0
            self._sampled_at = at
        earlier, self._last[position] = self._last[position], sample
        if earlier is None or (shown := _shown(earlier, sample)) is None:
            return
        tpot, steps = shown
        self.steps += (share := steps / len(self._last))
        self._mean += (min(_MOST_TPOT, max(_LEAST_TPOT, tpot)) - self._mean) * share / self.steps

    def lasted(self, seconds: float) -> None:
        """Learn from a sequence that took so long from its first token to its end."""
        self._ended = min(self._ended + 1, _MEMORY)
        self._lasted += (seconds - self._lasted) / self._ended


def compare(paces: Sequence[DecodePace]) -> tuple[float, list[float]] | None:
    """Find out what is usual among the servers of a pool and role, and how slow each of them is.

    What they tell is believed as far as it is like what the others tell, and as it agrees with our own clock.

    Returns:
        Seconds per token; and for each server how many times slower it is than average. None if none has told.
    """
    told = [each.told for each in paces if each.told is not None]
    if not told:
        return None
    usual = median([*told, DEFAULT_TPOT])  # with two servers it is the default that tells which one is odd
    known = [within(each.told or usual, usual, ODD_PACE) for each in paces]
    if not (steps := sum(each.steps for each in paces)):
        return usual, [1.0] * len(paces)
    average = sum(tpot * each.steps for tpot, each in zip(known, paces, strict=True)) / steps
    clocks = [each.lasting for each in paces if each.lasting is not None]
    lasting = fmean(clocks) if clocks else None
    slow = []
    for each, tpot in zip(paces, known, strict=True):
        slowness = within(tpot / average, 1.0, _ODD_SLOWNESS)
        if lasting and each.lasting is not None:
            slowness = within(slowness, within(each.lasting / lasting, 1.0, ODD_PACE), _CONTRADICTION)
        slowness **= each.steps / (each.steps + _TELLING)
        slow.append(slowness / within(slowness, 1.0, ALIKE))
    return usual, slow


def _shown(earlier: RankSample, sample: RankSample) -> tuple[float, float] | None:
    """Give the seconds per token that two samples of a rank show, and in how many steps, if they do."""
    if sample.decoded is not None:
        made = None if earlier.decoded is None else sample.decoded.since(earlier.decoded)
        return None if made is None else (made.tpot, made.steps)
    if not earlier.running_requests or not sample.running_requests or not sample.tokens_per_second:
        return None  # a rate from before there were sequences counts the pause, too
    return sample.running_requests / sample.tokens_per_second, _LOG_INTERVAL  # all get a token in each step
