"""Measure how busy the machine was, because a benchmark of scheduling must not become one of its processors."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PROCESSORS: Final = os.cpu_count() or 1

_REQUEST_SECONDS: Final = 0.004
"""CPU time of a request in its client, the router and both engines, as measured on one machine, in seconds."""
_TOKEN_SECONDS: Final = 15e-6
"""CPU time of each output token of a request, in seconds."""
_SHARE: Final = 0.45
"""Fraction of the machine that a run may use, by these estimates."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds so far."""

    at: float
    machine: float
    ours: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> Self:
        """Read ``/proc``.

        Args:
            pids: The processes of the run, without this one.
        """
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(each) for each in first.split()[1:9])
        machine = (user + nice + system + irq + softirq + steal) / _TICKS
        return cls(time.monotonic(), machine, sum(map(_seconds, [os.getpid(), *pids])))

    def shares_since(self, before: Self) -> tuple[float, float]:
        """Return the fraction of all processors' time that was not idle, and the part of it that the run used."""
        possible = max(1e-9, (self.at - before.at) * _PROCESSORS)
        return (self.machine - before.machine) / possible, (self.ours - before.ours) / possible


def time_scale_for(requests: float, tokens: float) -> float:
    """Choose how slow engines have to be for this machine to be busy about half of its time.

    Args:
        requests: Requests per second of an unscaled engine.
        tokens: Output tokens per second of an unscaled engine.
    """
    seconds = requests * _REQUEST_SECONDS + tokens * _TOKEN_SECONDS
    return max(1.0, round(seconds / (_SHARE * _PROCESSORS), 1))


def _seconds(pid: int) -> float:
    """Return the CPU time of a process, by ``proc_pid_stat(5)``: utime and stime are fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
