"""Simulate decode engines by the stand-in's rules in closed form, step by step.

A decode step of the stand-in looks at every sequence. Here a rank is two numbers, its sequences and their context, and
a heap of the steps at which sequences end: the same times, at a cost that does not grow with the sequences.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from dp_extproc.engines.model import DecodeSteps, LoadPage, RankSample
from dp_extproc.lab.engine.scheduler.snapshot import PUBLISH_INTERVAL, STALL_REFRESH
from dp_extproc.lab.simulate.engines import Schedule
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.workload.trace import TraceRequest

_RESERVED = 512
"""KV tokens that decode keeps free per accepted sequence (SGLang's ``num_reserved_decode_tokens``)."""
_LOG_INTERVAL = 40
"""Decode steps between two reports of an engine's throughput."""


class DecodeEngine:
    """Simulate a decode engine whose ranks step together."""

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

    @property
    def unaccepted(self) -> int:
        """The requests that wait for KV room."""
        return sum(map(len, self._waiting))

    def page(self, now: float, *, gauges: bool) -> LoadPage:
        """Report the load; see :meth:`dp_extproc.lab.simulate.engines.PrefillEngine.page`."""
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


class LooseDecodeEngine:
    """Simulate a decode engine each of whose ranks steps alone: as many engines of one rank."""

    def __init__(
        self,
        fleet: Fleet,
        slowness: float,
        schedule: Schedule,
        *,
        first_token: Callable[[int, float], None],
        finished: Callable[[int, float], None],
    ) -> None:
        """Start idle; see :class:`DecodeEngine`."""
        alone = replace(fleet, ranks=1)
        self._ranks = [
            DecodeEngine(alone, slowness, schedule, first_token=first_token, finished=finished)
            for _ in range(fleet.ranks)
        ]

    @property
    def unaccepted(self) -> int:
        return sum(each.unaccepted for each in self._ranks)

    @property
    def sequences(self) -> list[int]:
        return [each.sequences[0] for each in self._ranks]

    @property
    def context(self) -> list[int]:
        return [each.context[0] for each in self._ranks]

    @property
    def promised(self) -> list[int]:
        return [each.promised[0] for each in self._ranks]

    def reserve(self, rank: int, request: TraceRequest, now: float, reserved: Callable[[float], None]) -> None:
        self._ranks[rank].reserve(0, request, now, reserved)

    def start(self, number: int, rank: int, request: TraceRequest, now: float) -> None:
        self._ranks[rank].start(number, 0, request, now)

    def give_up(self, rank: int, request: TraceRequest, now: float) -> None:
        self._ranks[rank].give_up(0, request, now)

    def ends_of(self, rank: int) -> list[tuple[int, TraceRequest]]:
        return self._ranks[rank].ends_of(0)

    def requested_tokens(self, rank: int) -> int:
        return self._ranks[rank].requested_tokens(0)

    def page(self, now: float, *, gauges: bool) -> LoadPage:
        pages = [each.page(now, gauges=gauges) for each in self._ranks]
        return LoadPage(tuple(replace(page.ranks[0], dp_rank=rank) for rank, page in enumerate(pages)))
