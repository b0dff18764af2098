"""Measure how busy this machine was while requests ran, and with what."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_PROC: Final = Path("/proc")
_IDLE: Final = (3, 4)
"""Places of idle and iowait among the numbers of the first line of ``/proc/stat``."""
_COUNTED: Final = 8
"""Numbers that count; the two after them are of guests, and part of the first two."""


@dataclass(frozen=True, slots=True)
class Share:
    """How processors were used in a stretch of time."""

    client: float
    """Share of one processor that this process used."""
    busy: float | None = None
    """Share of all processors that was not idle. None where that cannot be measured."""
    own: float | None = None
    """Share of all processors that this process and its children used."""

    @property
    def external(self) -> float | None:
        """Return the share of all processors that other programs used."""
        return None if self.busy is None or self.own is None else max(0.0, self.busy - self.own)


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor time: the counters of a moment, or the difference of two moments."""

    seconds: float
    client: float
    machine: tuple[int, int, int] | None
    """Ticks of all processors in all, of those that were not idle, and of this process and its children."""

    @classmethod
    def now(cls) -> Self:
        """Read the counters."""
        return cls(time.monotonic(), time.process_time(), _ticks())

    def since(self, before: Self) -> Self:
        """Return the difference from *before*."""
        return self._with(before, -1)

    def plus(self, other: Self) -> Self:
        """Return the sum of two stretches of time."""
        return self._with(other, 1)

    def share(self) -> Share:
        """Return the shares of this stretch of time."""
        client = self.client / self.seconds if self.seconds else 0.0
        if self.machine is None or self.machine[0] <= 0:  # some sandboxes have a page of zeros
            return Share(client)
        total, busy, own = self.machine
        return Share(client, busy / total, own / total)

    def _with(self, other: Self, sign: int) -> Self:
        machine = None
        if self.machine is not None and other.machine is not None:
            total, busy, own = (mine + sign * its for mine, its in zip(self.machine, other.machine, strict=True))
            machine = total, busy, own
        return type(self)(self.seconds + sign * other.seconds, self.client + sign * other.client, machine)


def _ticks() -> tuple[int, int, int] | None:
    try:
        line = (_PROC / "stat").read_text(encoding="ascii").partition("\n")[0]
        numbers = [int(number) for number in line.split()[1:][:_COUNTED]]
        return sum(numbers), sum(numbers) - sum(numbers[place] for place in _IDLE), _own_ticks(os.getpid())
    except (OSError, ValueError, IndexError):
        return None


def _own_ticks(root: int) -> int:
    """Return the ticks of a process, its children and theirs, with those that have ended and were waited for."""
    found: dict[int, tuple[int, int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            # proc_pid_stat(5): behind the name in brackets come the state, the parent, and as 11th to 14th utime,
            # stime and both of waited-for children.
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        found[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    return sum(ticks for pid, (_, ticks) in found.items() if _descends(pid, root, found))


def _descends(pid: int, root: int, found: Mapping[int, tuple[int, int]]) -> bool:
    for _ in found:  # the pages are not of one moment: parents may seem to go round in a circle
        if pid == root:
            return True
        if pid not in found:
            return False
        pid = found[pid][0]
    return False
