"""Simulate engines: prefill by the stand-in's own scheduler, decode by the same rules in closed form, step by step.

A decode step of the stand-in looks at every sequence. Here a rank is two numbers, its sequences and their context, and
a heap of the steps at which sequences end: the same times, at a cost that does not grow with the sequences.
Pages are as old as those of an engine: what a scheduler has published at the end of a batch, requests in transfer
included.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from dp_extproc.engines.model import DecodeSteps, LoadPage, RankSample
from dp_extproc.lab.engine.scheduler.group import Group
from dp_extproc.lab.engine.scheduler.prefix_cache import prompt_of
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.snapshot import PUBLISH_INTERVAL, STALL_REFRESH, RankHistory, Snapshot
from dp_extproc.lab.engine.scheduler.work import Role, Stage, Work
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.workload.trace import TraceRequest

Schedule = Callable[[float, Callable[[float], None]], None]
"""Calls an action with the time, so many seconds from now."""

_RESERVED = 512
"""KV tokens that decode keeps free per accepted sequence (SGLang's ``num_reserved_decode_tokens``)."""
_LOG_INTERVAL = 40
"""Decode steps between two reports of an engine's throughput."""


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
        self.group = Group(self.ranks, fleet.costs)
        self.histories = [RankHistory(rank) for rank in self.ranks]
        self.stepping = False
        self.busy = 0.0
        """Seconds in steps, summed over ranks."""
        self.waited = 0.0
        """Seconds in steps in which ranks waited for the fullest one, summed over ranks."""
        self._fleet = fleet
        self._slowness = slowness
        self._schedule = schedule
        self._computed = computed
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
        self.wake(now)

    def give_up(self, number: int, rank: int) -> bool:
        """Remove a request, if no step has computed a part of it yet."""
        of = self.ranks[rank]
        work = next((work for work in of.queue if work.rid == str(number)), None)
        if work is not None:
            of.remove(work)
        return work is not None

    def wake(self, now: float) -> None:
        """Start a step if there is work and none is running."""
        if self.stepping:
            return
        step, _ = self.group.begin(now)
        if step is None:
            self._idle(now)
            return
        self.stepping = True
        self._step = step
        for history, batch in zip(self.histories, step.batches, strict=True):
            history.begin_step(batch)
        tokens = [sum(rank.chunks.values()) for rank in self.ranks]
        seconds = step.seconds * self._slowness
        self.busy += seconds * len(tokens)
        self.waited += seconds * (len(tokens) - sum(tokens) / max(tokens))
        self._schedule(seconds, self._finish)

    def sent(self, work: Work, now: float) -> None:
        """Free what held the KV cache of a prompt, which has been sent."""
        self.ranks[work.dp_rank].transferred(work)
        self._prompt_tokens += work.prompt_tokens
        self.wake(now)

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
        if not self.stepping:
            self._idle(now)
        samples = []
        for rank, history in enumerate(self.histories):
            if gauges:
                samples.append(RankSample(rank, 0 if history.gauges is None else history.gauges.num_used_tokens))
            elif history.published is not None:
                samples.append(_sample(rank, history.published, now - history.published_at))
        return LoadPage(tuple(samples), self._prompt_tokens)

    def _idle(self, now: float) -> None:
        for history in self.histories:
            history.idle(now)

    def _finish(self, now: float) -> None:
        batches, seconds = self._step.batches, self._step.seconds * self._slowness
        for history, batch in zip(self.histories, batches, strict=True):
            history.finish_step(batch, seconds, now)
        outputs = self.group.finish()
        for history, batch in zip(self.histories, batches, strict=True):
            history.report_batch(batch, now)
        self.stepping = False
        for output in outputs:
            self._computed(output.work, now)
        self.wake(now)


def _sample(rank: int, snapshot: Snapshot, age: float) -> RankSample:
    """Read a snapshot of a prefill rank as the service reads ``/v1/loads``."""
    return RankSample(
        rank,
        used_tokens=snapshot.num_used_tokens,
        total_tokens=snapshot.num_total_tokens,
        waiting_uncached_tokens=snapshot.num_waiting_uncached_tokens,
        running_requests=snapshot.num_running_reqs + snapshot.queues[Stage.INFLIGHT],
        waiting_requests=snapshot.num_waiting_reqs,
        capacity_tokens=snapshot.max_total_num_tokens,
        age=age,
    )


class DecodeEngine:
    """Simulate a decode engine."""

    def __init__(
        self,
        fleet: Fleet,
        slowness: float,
        schedule: Schedule,
        *,
        first_token: Callable[[int, float], None],
        finished: Callable[[int, float], None],
    ) -> None:
        """Start idle.

        Args:
            fleet: The fleet that it belongs to.
            slowness: Factor of its step times.
            schedule: Calls an action after so many seconds.
            first_token: Called with the number of every request that begins to decode.
            finished: Called with the number of every request that has its last token.
        """
        size = fleet.ranks
        self.sequences = [0] * size
        self.context = [0] * size
        self.promised = [0] * size
        """KV tokens in use or reserved."""
        self.stepping = False
        self.steps = 0
        self._accepted = [0] * size
        self._fleet = fleet
        self._slowness = slowness
        self._schedule = schedule
        self._first_token = first_token
        self._finished = finished
        self._waiting: list[deque[tuple[TraceRequest, Callable[[float], None]]]] = [deque() for _ in range(size)]
        self._arrived: list[tuple[int, int, TraceRequest]] = []
        self._ends: list[tuple[int, int, int, TraceRequest]] = []
        """Heap of (step, number, rank, request)."""
        self._tokens_before = [0] * size
        self._made_since = 0.0
        self._throughput = [0.0] * size
        self._step_seconds = 0.0
        self._decode_steps = [0] * size
        """Steps in which the rank had sequences."""
        self._decode_seconds = [0.0] * size
        """Seconds that these steps took."""
        self._decode_tokens = [0] * size
        """Tokens that these steps made, one for each sequence."""
        self._published = self._samples()
        self._published_at = 0.0
        self._unpublished = 0
        """Steps since the last sample that was published."""

    def reserve(self, rank: int, request: TraceRequest, now: float, reserved: Callable[[float], None]) -> None:
        """Reserve KV room for a prompt, now or when there is some; *reserved* is called then."""
        self._waiting[rank].append((request, reserved))
        self._admit(rank, now)

    def start(self, number: int, rank: int, request: TraceRequest, now: float) -> None:
        """Accept a sequence whose KV cache has arrived."""
        self._arrived.append((number, rank, request))
        if not self.stepping:
            self._begin(now)

    def give_up(self, rank: int, request: TraceRequest, now: float) -> None:
        """Remove a sequence that has its reservation, and whose KV cache will not come."""
        self._accepted[rank] -= 1
        self.promised[rank] -= request.prompt_tokens
        self._admit(rank, now)

    def ends_of(self, rank: int) -> list[tuple[int, TraceRequest]]:
        """Return the steps that each sequence of a rank still needs."""
        return [(step - self.steps, request) for step, _, of, request in self._ends if of == rank]

    def requested_tokens(self, rank: int) -> int:
        """Return the KV tokens that a rank has reserved, or will have to."""
        return self.promised[rank] + sum(request.prompt_tokens for request, _ in self._waiting[rank])

    def page(self, now: float, *, gauges: bool) -> LoadPage:
        """Report the load; see :meth:`PrefillEngine.page`."""
        if gauges:
            samples = self._samples()
            return LoadPage(tuple(replace(each, total_tokens=None, decoded=None) for each in samples))
        if not self.stepping and now - self._published_at >= STALL_REFRESH:
            self._publish(now)
        age = now - self._published_at
        return LoadPage(tuple(replace(sample, age=age) for sample in self._published))

    def _publish(self, now: float) -> None:
        self._published, self._published_at, self._unpublished = self._samples(), now, 0

    def _samples(self) -> list[RankSample]:
        return [
            RankSample(
                rank,
                used_tokens=self.promised[rank],
                total_tokens=self.requested_tokens(rank),
                running_requests=self.sequences[rank],
                waiting_requests=self._accepted[rank] - self.sequences[rank] + len(self._waiting[rank]),
                capacity_tokens=self._fleet.capacity,
                tokens_per_second=self._throughput[rank] or None,
                decoded=self._decoded(rank),
            )
            for rank in range(self._fleet.ranks)
        ]

    def _decoded(self, rank: int) -> DecodeSteps:
        tokens = self._decode_tokens[rank]
        return DecodeSteps(self._decode_steps[rank], tokens, self._decode_seconds[rank], tokens)

    def _admit(self, rank: int, now: float) -> None:
        waiting = self._waiting[rank]
        while waiting:
            request, reserved = waiting[0]
            kept_back = _RESERVED * self._accepted[rank]
            if self._accepted[rank] and request.prompt_tokens > self._fleet.capacity - self.promised[rank] - kept_back:
                return
            waiting.popleft()
            self._accepted[rank] += 1
            self.promised[rank] += request.prompt_tokens
            reserved(now)

    def _begin(self, now: float) -> None:
        for number, rank, request in self._arrived:
            self._first_token(number, now)
            self.promised[rank] += 1
            if request.output_tokens <= 1:
                self._leave(number, rank, request, now)
                continue
            self.sequences[rank] += 1
            self.context[rank] += request.prompt_tokens + 1
            heapq.heappush(self._ends, (self.steps + request.output_tokens - 1, number, rank, request))
        self._arrived.clear()
        self.stepping = any(self.sequences)
        if self.stepping:
            costs = self._fleet.costs
            self._step_seconds = costs.decode_seconds(self.sequences, self.context) * self._slowness
            self._schedule(self._step_seconds, self._finish)

    def _finish(self, now: float) -> None:
        self.steps += 1
        for rank, count in enumerate(self.sequences):
            self.context[rank] += count
            self.promised[rank] += count
            if count:
                self._decode_steps[rank] += 1
                self._decode_seconds[rank] += self._step_seconds
                self._decode_tokens[rank] += count
        self._unpublished += 1
        if self._unpublished == PUBLISH_INTERVAL:
            self._publish(now)
        if self.steps % _LOG_INTERVAL == 0:
            elapsed = now - self._made_since
            made = zip(self._decode_tokens, self._tokens_before, strict=True)
            self._throughput = [(tokens - before) / elapsed for tokens, before in made]
            self._tokens_before, self._made_since = [*self._decode_tokens], now
        while self._ends and self._ends[0][0] <= self.steps:
            _, number, rank, request = heapq.heappop(self._ends)
            self.sequences[rank] -= 1
            self.context[rank] -= request.prompt_tokens + request.output_tokens
            self._leave(number, rank, request, now)
        self._begin(now)
        if not self.stepping:
            self._publish(now)

    def _leave(self, number: int, rank: int, request: TraceRequest, now: float) -> None:
        self._accepted[rank] -= 1
        self.promised[rank] -= request.prompt_tokens + request.output_tokens
        self._finished(number, now)
        self._admit(rank, now)
