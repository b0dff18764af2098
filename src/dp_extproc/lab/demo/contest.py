"""Send the same requests through every router, in turns, and collect the results."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.demo.jobs import Job, Outcome, make_jobs
from dp_extproc.lab.demo.machine import Spent
from dp_extproc.lab.demo.probe import LoadProbe, watch
from dp_extproc.lab.demo.standin import Account, Mark
from dp_extproc.lab.demo.traffic import send

_WARM_UP: Final = 16


class UnreachableError(RuntimeError):
    """A router that answers no request; the message has its name and the reason."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A router with its printed name."""

    name: str
    run: Callable[[], AbstractContextManager[str]]
    """Runs it, and returns its URL."""


@dataclass(frozen=True, slots=True)
class Load:
    """The requests that are sent to every router."""

    jobs: Sequence[Job]
    concurrency: int
    model: str
    warm_up: Sequence[Job] = field(default_factory=lambda: make_jobs(_WARM_UP, seed=0))
    """Requests that open connections, and let decode ranks connect to prefill ranks."""


@dataclass(slots=True)
class Run:
    """The results of one contender."""

    name: str
    probe: LoadProbe = field(default_factory=LoadProbe)
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    spent: Spent = field(default_factory=lambda: Spent(0.0, 0.0, (0, 0, 0)))
    account: Account | None = field(default_factory=Account)
    """None when not all engines are stand-ins."""


def turns(contenders: int, jobs: Sequence[Job]) -> list[tuple[int, Sequence[Job]]]:
    """Return which contender gets which jobs, in order: each gets all once, in two halves, then back in reverse.

    A machine that becomes slower or faster meanwhile affects all alike.
    """
    if contenders == 1:
        return [(0, jobs)]
    middle = len(jobs) // 2
    there, back = range(contenders), reversed(range(contenders))
    every = [*((who, jobs[:middle]) for who in there), *((who, jobs[middle:]) for who in back)]
    return [(who, some) for who, some in every if some]


@dataclass(frozen=True, slots=True)
class Contest:
    """Some routers in front of the same engines."""

    contenders: Sequence[Contender]
    engines: Mapping[str, str]
    """URLs by the printed names."""
    load: Load
    console: Console
    interrupts: Interrupts

    def hold(self) -> list[Run]:
        """Send all requests.

        Raises:
            UnreachableError: A router answers nothing.
        """
        runs = [Run(contender.name) for contender in self.contenders]
        order = turns(len(runs), self.load.jobs)
        for number, (who, jobs) in enumerate(order, 1):
            contender = self.contenders[who]
            self.console.print(
                f"{number} of {len(order)}: {escape(contender.name)}, {len(jobs)} requests", highlight=False
            )
            began = time.perf_counter()
            with contender.run() as url:
                self._take_turn(contender.name, url, jobs, runs[who])
            self.interrupts.check()
            took = time.perf_counter() - began
            self.console.print(f"  {took:.0f} s{self._rest(took, len(order) - number)}", highlight=False)
        return runs

    @staticmethod
    def _rest(took: float, turns_left: int) -> str:
        return f"; about {took * turns_left:.0f} s to go" if turns_left else ""

    def _take_turn(self, name: str, url: str, jobs: Sequence[Job], run: Run) -> None:
        columns = (TextColumn(escape(name)), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Where lines cannot be written over, the line that was printed before is enough.
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=len(jobs))
            self.interrupts.run(self._measure(name, url, jobs, run, lambda: progress.advance(task)))

    async def _measure(self, name: str, url: str, jobs: Sequence[Job], run: Run, on_done: Callable[[], None]) -> None:
        load = self.load
        greeted = await send(url, load.model, load.warm_up, len(load.warm_up), lambda: None)
        if all(outcome.error is not None for outcome in greeted):
            raise UnreachableError(f"{name} at {url} answers no request: {greeted[0].error}")
        mark = await Mark.now(self.engines) if run.account is not None else None
        async with watch(self.engines, run.probe):
            before, began = await asyncio.to_thread(Spent.now), time.perf_counter()
            run.outcomes += await send(url, load.model, jobs, load.concurrency, on_done)
            run.seconds += time.perf_counter() - began
            run.spent = run.spent.plus(Spent.now().since(before))
        if mark is None or run.account is None or not await mark.add_since(self.engines, run.account):
            run.account = None
