"""Simulate prefill engines, by the stand-in's own scheduler.

Pages are as old as those of an engine: what a scheduler has published at the end of a batch, with requests in transfer.
"""

from collections.abc import Callable, Sequence

from dp_extproc.engines.model import DecodeSteps, LoadPage, PrefillSteps, RankSample
from dp_extproc.lab.engine.scheduler.group import Group, Step
from dp_extproc.lab.engine.scheduler.prefix_cache import prompt_of
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory, Snapshot
from dp_extproc.lab.engine.scheduler.work import Role, Stage, Work
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.workload.trace import TraceRequest

Schedule = Callable[[float, Callable[[float], None]], None]
"""Calls an action with the time, so many seconds from now."""


class PrefillEngine:
    """Simulate a prefill engine."""

    def __init__(
        self, fleet: Fleet, slowness: float, schedule: Schedule, computed: Callable[[Work, float], None]
    ) -> None:
        """Start idle.

        Args:
            fleet: The fleet that it belongs to.
            slowness: Factor of its step times.
            schedule: Calls an action after so many seconds.
            computed: Called for every prompt whose last chunk has run.
        """
        limits = Limits(fleet.capacity, 1 << 20, fleet.chunk, fleet.batch)
        self.ranks = [Rank(rank, limits, Role.PREFILL) for rank in range(fleet.ranks)]
        self.groups = groups_of(self.ranks, fleet)
        self.histories = [RankHistory(rank) for rank in self.ranks]
        self.busy = 0.0
        """Seconds in steps, summed over ranks."""
        self.waited = 0.0
        """Seconds in steps in which ranks waited for the fullest one, summed over ranks."""
        self._fleet = fleet
        self._slowness = slowness
        self._schedule = schedule
        self._computed = computed
        self._steps: list[Step | None] = [None] * len(self.groups)
        """The running step of each group."""
        self._prompt_tokens = 0
        """Tokens of all prompts that it has answered."""
        for history in self.histories:
            history.publish(0.0)
            history.report(0.0)

    def arrive(self, number: int, rank: int, request: TraceRequest) -> None:
        """Accept a request that may not start yet, because decode has no room for it so far."""
        work = Work(str(number), rank, request.prompt_tokens, 1)
        if self._fleet.prefix_cache:
            work.prompt = prompt_of([(segment.text, segment.tokens) for segment in request.prompt])
        self.ranks[rank].add(work, Stage.BOOTSTRAP)

    def start(self, number: int, rank: int, now: float) -> None:
        """Let a request start that has arrived."""
        of = self.ranks[rank]
        work = next(work for work in of.queued(Stage.BOOTSTRAP) if work.rid == str(number))
        of.queue.remove(work)
        of.add(work, Stage.WAITING)
        self._wake(rank, now)

    def give_up(self, number: int, rank: int) -> bool:
        """Remove a request, if no step has computed a part of it yet."""
        return give_up(self.ranks[rank], number)

    def sent(self, work: Work, now: float) -> None:
        """Free what held the KV cache of a prompt, which has been sent."""
        self.ranks[work.dp_rank].transferred(work)
        self._prompt_tokens += work.prompt_tokens
        self._wake(work.dp_rank, now)

    def backlog(self, rank: int) -> int:
        """Return the prompt tokens of a rank that no step has taken yet, cached ones included."""
        of = self.ranks[rank]
        return sum(
            work.prompt_tokens - work.prefilled - of.chunks.get(work, 0)
            for works in (of.queued(Stage.WAITING), of.running)
            for work in works
        )

    def cached(self, rank: int, request: TraceRequest) -> int:
        """Return the tokens of a prompt that a rank has cached."""
        prompt = prompt_of([(segment.text, segment.tokens) for segment in request.prompt])
        return self.ranks[rank].cache.match(prompt, request.prompt_tokens - 1).end

    def page(self, now: float, *, gauges: bool) -> LoadPage:
        """Report the load: the numbers of ``/v1/loads``, or only the gauges, both as old as those of an engine."""
        for index, step in enumerate(self._steps):
            if step is None:
                self._idle(index, now)
        return LoadPage(read_histories(self.histories, now, gauges=gauges), self._prompt_tokens)

    def rest_of_step(self, rank: int) -> float:
        """Return half of the running step that a rank waits for, in tokens: how long it still takes on average."""
        index = group_of(rank, self.groups)
        if self._steps[index] is None:
            return 0.0
        costs = self._fleet.costs
        running = max(sum(each.chunks.values()) for each in self.groups[index].ranks)
        return (costs.prefill_step / costs.prefill_token + running) / 2

    def _histories_of(self, index: int) -> list[RankHistory]:
        return [self.histories[rank.dp_rank] for rank in self.groups[index].ranks]

    def _wake(self, rank: int, now: float) -> None:
        index = group_of(rank, self.groups)
        if self._steps[index] is None:
            self._begin(index, now)

    def _begin(self, index: int, now: float) -> None:
        """Start a step if there is work."""
        group = self.groups[index]
        step, _ = group.begin(now)
        if step is None:
            self._idle(index, now)
            return
        self._steps[index] = step
        for history, batch in zip(self._histories_of(index), step.batches, strict=True):
            history.begin_step(batch)
        tokens = [sum(rank.chunks.values()) for rank in group.ranks]
        seconds = step.seconds * self._slowness
        self.busy += seconds * len(tokens)
        self.waited += seconds * (len(tokens) - sum(tokens) / max(tokens))
        self._schedule(seconds, lambda now: self._finish(index, step, now))

    def _idle(self, index: int, now: float) -> None:
        for history in self._histories_of(index):
            history.idle(now)

    def _finish(self, index: int, step: Step, now: float) -> None:
        histories = self._histories_of(index)
        for history, batch in zip(histories, step.batches, strict=True):
            history.finish_step(batch, step.seconds * self._slowness, now)
        outputs = self.groups[index].finish()
        for history, batch in zip(histories, step.batches, strict=True):
            history.report_batch(batch, now)
        self._steps[index] = None
        for output in outputs:
            self._computed(output.work, now)
        self._begin(index, now)


def groups_of(ranks: list[Rank], fleet: Fleet) -> list[Group]:
    """Return the ranks that step together: all of an engine, or each alone."""
    return [Group(members, fleet.costs) for members in ([ranks] if fleet.lockstep else [[rank] for rank in ranks])]


def group_of(rank: int, groups: Sequence[Group]) -> int:
    """Return the index of the group of a rank."""
    return 0 if len(groups) == 1 else rank


def give_up(rank: Rank, number: int) -> bool:
    """Remove a request from a rank, if no step has computed a part of it yet."""
    work = next((work for work in rank.queue if work.rid == str(number)), None)
    if work is not None:
        rank.remove(work)
    return work is not None


def read_histories(histories: Sequence[RankHistory], now: float, *, gauges: bool) -> tuple[RankSample, ...]:
    """Read what all ranks have published, or only their gauges."""
    samples = []
    for rank, history in enumerate(histories):
        if gauges:
            samples.append(RankSample(rank, 0 if history.gauges is None else history.gauges.num_used_tokens))
        elif history.published is not None:
            samples.append(read_snapshot(rank, history.published, now - history.published_at))
    return tuple(samples)


def read_snapshot(rank: int, snapshot: Snapshot, age: float) -> RankSample:
    """Read a snapshot of a rank as the service reads ``/v1/loads``."""
    moments = snapshot.decode_moments
    return RankSample(
        rank,
        used_tokens=snapshot.num_used_tokens,
        total_tokens=snapshot.num_total_tokens,
        waiting_uncached_tokens=snapshot.num_waiting_uncached_tokens,
        running_requests=snapshot.num_running_reqs + snapshot.queues[Stage.INFLIGHT],
        waiting_requests=snapshot.num_waiting_reqs,
        capacity_tokens=snapshot.max_total_num_tokens,
        tokens_per_second=snapshot.gen_throughput or None,
        decoded=None if moments is None else DecodeSteps(moments[0], moments[1], moments[2] / 1e6, moments[5]),
        prefilled=PrefillSteps(snapshot.total_prefill_uncached_tokens, snapshot.total_prefill_busy_us / 1e6),
        age=age,
    )
