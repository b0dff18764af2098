"""Simulate aggregated engines, by the stand-in's own scheduler: they compute prompts and decode."""

from collections.abc import Callable

from dp_extproc.engines.model import LoadPage
from dp_extproc.lab.engine.scheduler.group import Step
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory
from dp_extproc.lab.engine.scheduler.work import Output, Role, Stage, Work
from dp_extproc.lab.simulate.engines import Schedule, give_up, group_of, groups_of, read_histories
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.workload.trace import TraceRequest


class WorkerEngine:
    """Simulate an aggregated engine."""

    def __init__(
        self,
        fleet: Fleet,
        slowness: float,
        schedule: Schedule,
        *,
        first_token: Callable[[int, float], None],
        finished: Callable[[int, float], None],
    ) -> None:
        """Start idle; see :class:`dp_extproc.lab.simulate.decode.DecodeEngine`."""
        limits = Limits(fleet.capacity, 1 << 20, fleet.chunk, fleet.batch)
        self.ranks = [Rank(rank, limits, Role.UNIFIED) for rank in range(fleet.ranks)]
        self.groups = groups_of(self.ranks, fleet)
        self._histories = [RankHistory(rank) for rank in self.ranks]
        self._steps: list[Step | None] = [None] * len(self.groups)
        self._slowness = slowness
        self._schedule = schedule
        self._first_token = first_token
        self._finished = finished
        self._prompt_tokens = 0
        """Tokens of the prompts of all requests that have ended."""
        for history in self._histories:
            history.publish(0.0)
            history.report(0.0)

    def add(self, number: int, rank: int, request: TraceRequest, now: float) -> None:
        """Accept a request."""
        self.ranks[rank].add(Work(str(number), rank, request.prompt_tokens, request.output_tokens), Stage.WAITING)
        index = group_of(rank, self.groups)
        if self._steps[index] is None:
            self._begin(index, now)

    def give_up(self, number: int, rank: int) -> bool:
        """Remove a request, if no step has computed a part of it yet."""
        return give_up(self.ranks[rank], number)

    def page(self, now: float, *, gauges: bool) -> LoadPage:
        """Report the load; see :meth:`dp_extproc.lab.simulate.engines.PrefillEngine.page`."""
        for rank, history in enumerate(self._histories):
            if self._steps[group_of(rank, self.groups)] is None:
                history.idle(now)
        return LoadPage(read_histories(self._histories, now, gauges=gauges), self._prompt_tokens)

    def _histories_of(self, index: int) -> list[RankHistory]:
        return [self._histories[rank.dp_rank] for rank in self.groups[index].ranks]

    def _begin(self, index: int, now: float) -> None:
        """Start a step if there is work."""
        step, _ = self.groups[index].begin(now)
        self._steps[index] = step
        if step is None:
            for history in self._histories_of(index):
                history.idle(now)
            return
        for history, batch in zip(self._histories_of(index), step.batches, strict=True):
            history.begin_step(batch)
        self._schedule(step.seconds * self._slowness, lambda now: self._finish(index, step, now))

    def _finish(self, index: int, step: Step, now: float) -> None:
        histories = self._histories_of(index)
        for history, batch in zip(histories, step.batches, strict=True):
            history.finish_step(batch, step.seconds * self._slowness, now)
        outputs = self.groups[index].finish()
        for history, batch in zip(histories, step.batches, strict=True):
            history.report_batch(batch, now)
        for output in outputs:
            self._report(output, now)
        self._begin(index, now)

    def _report(self, output: Output, now: float) -> None:
        number = int(output.work.rid)
        if output.token == 0:
            self._first_token(number, now)
        if output.finished:
            self._prompt_tokens += output.work.prompt_tokens
            self._finished(number, now)
