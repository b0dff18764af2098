"""How busy the machine was: a benchmark of placement must not become one of its processors."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Ticks:
    """What all processors have done since the machine started."""

    busy: int
    all: int

    @classmethod
    def now(cls) -> Self:
        """Read ``/proc/stat``: user, nice, system, idle, iowait, irq, softirq, steal."""
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        ticks = [int(each) for each in first.split()[1:9]]
        return cls(sum(ticks) - ticks[3] - ticks[4], sum(ticks))

    def busy_share_since(self, before: "Ticks") -> float:
        """Give the share of all processors' time that was not idle."""
        return (self.busy - before.busy) / max(1, self.all - before.all)


def time_scale_for(requests: float, tokens: float) -> float:
    """Choose how slow engines have to be for this machine to keep up at about half of its time.

    Args:
        requests: Per second of an unscaled engine.
        tokens: Of output, likewise.
    """
    seconds = requests * _REQUEST_SECONDS + tokens * _TOKEN_SECONDS
    return max(1.0, round(seconds / (_SHARE * (os.cpu_count() or 1)), 1))


_REQUEST_SECONDS = 0.010
"""Processor time of a request in its client, the router, both engines; measured on one of the slower kind."""
_TOKEN_SECONDS = 40e-6
"""... and of each of its output tokens."""
_SHARE = 0.45
