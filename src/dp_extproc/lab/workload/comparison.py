"""Compare one number of several contenders, seed by seed, with a confidence interval."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_STUDENT: Final = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; beyond, the normal distribution is used."""
_NORMAL: Final = 1.96


@dataclass(frozen=True, slots=True)
class Change:
    """A change against a baseline, as a share of it: -0.2 is a fifth less."""

    mean: float
    margin: float | None
    """Half the width of the 95 % interval; None with one seed."""

    @property
    def is_certain(self) -> bool:
        """Whether the interval excludes the other sign."""
        return self.margin is not None and abs(self.mean) > self.margin


def change(values: Sequence[float], baseline: Sequence[float]) -> Change:
    """Compare with a baseline that has had the same traces, pair by pair.

    Raises:
        ValueError: There are no pairs, or their numbers differ.
    """
    if not values:
        raise ValueError("no runs to compare")
    changes = [value / base - 1 for value, base in zip(values, baseline, strict=True)]
    count = len(changes)
    if count == 1:
        return Change(changes[0], None)
    quantile = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
    return Change(statistics.fmean(changes), quantile * statistics.stdev(changes) / count**0.5)
