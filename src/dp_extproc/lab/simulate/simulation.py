"""Run one trace through a router and a fleet. Time is a number, and all randomness comes from the seed."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from random import Random
from typing import Protocol

from dp_extproc.engines.model import LoadPage, Role
from dp_extproc.lab.engine.scheduler.work import Work
from dp_extproc.lab.simulate.decode import DecodeEngine, LooseDecodeEngine
from dp_extproc.lab.simulate.engines import PrefillEngine
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.outcome import Outcome, RunResult
from dp_extproc.lab.simulate.workers import WorkerEngine
from dp_extproc.lab.workload.trace import TraceRequest

_MUTE_SECONDS = 20.0
"""Length of a turn in which an engine can or cannot be read."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The engines and ranks of a request, by their indexes. Without prefill engines decode is an aggregated one."""

    prefill: int
    prefill_rank: int
    decode: int
    decode_rank: int


class Router(Protocol):
    """Schedules requests, which are numbers, by the events that it receives."""

    def place(self, number: int, request: TraceRequest, now: float) -> Placement: ...
    def prefill_answered(self, number: int, now: float) -> None: ...
    def first_token(self, number: int, now: float) -> None: ...
    def ended(self, number: int, now: float) -> None: ...
    def scraped(self, role: Role, engine: int, page: LoadPage, started: float, now: float) -> None: ...

    @property
    def reads_gauges(self) -> bool:
        """Whether it reads the gauges of an engine rather than its page of loads."""
        ...


class Simulation:
    """Hold the fleet and the clock. The clairvoyant router reads both."""

    def __init__(self, fleet: Fleet, around: Surroundings, trace: Sequence[TraceRequest], seed: int) -> None:
        self.fleet = fleet
        self.around = around
        self.trace = trace
        self.rng = Random(f"simulation {seed}")
        self._seed = seed
        self.prefills = [
            PrefillEngine(fleet, fleet.slow_prefill if index == 0 else 1.0, self.after, self._computed)
            for index in range(fleet.prefill)
        ]
        kind = DecodeEngine if fleet.lockstep else LooseDecodeEngine
        self.decodes = [
            kind(fleet, self._slowness_of(index), self.after, first_token=self._first_token, finished=self._finished)
            for index in range(fleet.decode if fleet.prefill else 0)
        ]
        self.workers = [
            WorkerEngine(
                fleet,
                self._slowness_of(index),
                self.after,
                first_token=self._first_token,
                finished=self._finished,
            )
            for index in range(0 if fleet.prefill else fleet.decode)
        ]
        self.engine_ranks = EngineRanks(fleet, self.rng)
        self.on_the_way: dict[int, Placement] = {}
        """Requests that have not reached prefill yet."""
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._placements: dict[int, Placement] = {}
        self._sent: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._outcomes: list[Outcome] = []
        self._direct: set[int] = set()
        chance = Random(f"aborts {seed}")
        self._patience = {
            number: chance.expovariate(1 / around.patience)
            for number in range(len(trace))
            if chance.random() < around.aborts
        }
        """Seconds until a client leaves, by its request."""
        self._left: set[int] = set()
        self._over = 0
        self._backlog: list[int] = []

    def _slowness_of(self, index: int) -> float:
        """Return the factor of the step times of an engine that decodes."""
        return self.fleet.slow_decode if index == 0 else 1.0

    def run(self, router: Router, *, concurrency: int | None = None) -> RunResult:
        """Send the trace: at its arrivals, or with so many requests at a time."""
        self._router = router
        if concurrency is None:
            for number, request in enumerate(self.trace):
                self._at(request.arrival, partial(self._arrive, number))
        else:
            self._backlog = list(range(len(self.trace)))[::-1]
            for _ in range(concurrency):
                self._next(0.0)
        self._scrape(0.0)
        while self._over < len(self.trace):
            self._now, _, action = heapq.heappop(self._events)
            action(self._now)
        return RunResult(
            self._outcomes,
            sum(engine.waited for engine in self.prefills) / max(1e-9, sum(engine.busy for engine in self.prefills)),
        )

    def settle(self, seconds: float = 1.0) -> None:
        """Deliver what is on its way, after the last request has ended."""
        until = self._now + seconds
        while self._events and self._events[0][0] <= until:
            self._now, _, action = heapq.heappop(self._events)
            action(self._now)

    def _at(self, when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def after(self, seconds: float, action: Callable[[float], None]) -> None:
        """Schedule an action so many seconds from now."""
        self._at(self._now + seconds, action)

    def _notify(self, action: Callable[[float], None]) -> None:
        """Notify the router, unless it receives no such events."""
        if self.around.answers:
            self.after(self.around.network, action)

    def _next(self, now: float) -> None:
        if self._backlog:
            number = self._backlog.pop()
            self._at(now, partial(self._arrive, number))

    def _arrive(self, number: int, now: float) -> None:
        self._sent[number] = now
        self.after(self.around.network, lambda now: self._place(number, now))
        if number in self._patience:
            self.after(self._patience[number], lambda now: self._leave(number, now))

    def _place(self, number: int, now: float) -> None:
        request = self.trace[number]
        if self.around.direct_share and self.rng.random() < self.around.direct_share:
            self._direct.add(number)
            placement = self.engine_ranks.place()
        else:
            placement = self._router.place(number, request, now)
        self._placements[number] = self.on_the_way[number] = placement
        if self.workers:
            worker = self.workers[placement.decode]

            def taken(now: float) -> None:
                del self.on_the_way[number]
                if number not in self._left:
                    worker.add(number, placement.decode_rank, request, now)

            self.after(self.around.network, taken)
            return
        decode = self.decodes[placement.decode]

        def reserved(_: float) -> None:
            self.after(self.around.handshake, lambda now: self._start(number, now))

        def arrived(now: float) -> None:
            self.prefills[placement.prefill].arrive(number, placement.prefill_rank, request)
            decode.reserve(placement.decode_rank, request, now, reserved)

        self.after(self.around.network, arrived)

    def _leave(self, number: int, now: float) -> None:
        """Let a client leave, if its request still waits; else it stays, as its answer is about to come."""
        if number in self.on_the_way:
            self._left.add(number)
            self._ended(number, now)
        elif (placement := self._placements.get(number)) is not None and self.workers:
            if self.workers[placement.decode].give_up(number, placement.decode_rank):
                self._ended(number, now)
        elif placement is not None and self.prefills[placement.prefill].give_up(number, placement.prefill_rank):
            self.decodes[placement.decode].give_up(placement.decode_rank, self.trace[number], now)
            self._ended(number, now)

    def _start(self, number: int, now: float) -> None:
        placement = self.on_the_way.pop(number)
        prefill = self.prefills[placement.prefill]
        if number in self._left:
            prefill.give_up(number, placement.prefill_rank)
            self.decodes[placement.decode].give_up(placement.decode_rank, self.trace[number], now)
            return
        prefill.start(number, placement.prefill_rank, now)

    def _computed(self, work: Work, _now: float) -> None:
        self.after(self.fleet.costs.transfer_seconds(work.prompt_tokens), lambda now: self._transferred(work, now))

    def _transferred(self, work: Work, now: float) -> None:
        number = int(work.rid)
        placement = self._placements[number]
        self.prefills[placement.prefill].sent(work, now)
        if number not in self._direct:
            self._notify(lambda now: self._router.prefill_answered(number, now))
        self.decodes[placement.decode].start(number, placement.decode_rank, self.trace[number], now)

    def _first_token(self, number: int, now: float) -> None:
        self._first[number] = now + 2 * self.around.network
        if number not in self._direct:
            self._notify(lambda now: self._router.first_token(number, now))

    def _finished(self, number: int, now: float) -> None:
        request = self.trace[number]
        sent, first, end = self._sent.pop(number), self._first.pop(number), now + 2 * self.around.network
        per_token = (end - first) / (request.output_tokens - 1) if request.output_tokens > 1 else None
        if number not in self._patience:
            tokens = request.prompt_tokens + request.output_tokens
            self._outcomes.append(Outcome(number, first - sent, per_token, end - sent, tokens))
        if not self.around.answers and number not in self._direct:  # the whole answer comes at once then
            self.after(self.around.network, lambda now: self._router.first_token(number, now))
        self._ended(number, now)

    def _ended(self, number: int, now: float) -> None:
        self._over += 1
        if number not in self._direct:
            self.after(self.around.network, lambda now: self._router.ended(number, now))
        self._next(now + 2 * self.around.network)

    def _scrape(self, now: float) -> None:
        if not self.around.scrapes and now > 0:
            return  # engines have been discovered, and report nothing more
        gauges = self._router.reads_gauges
        pages = [(Role.PREFILL, index, engine.page(now, gauges=gauges)) for index, engine in enumerate(self.prefills)]
        pages += [(Role.DECODE, index, engine.page(now, gauges=gauges)) for index, engine in enumerate(self.decodes)]
        pages += [(Role.WORKER, index, engine.page(now, gauges=gauges)) for index, engine in enumerate(self.workers)]
        for role, index, page in pages:
            if self._is_mute(role, index, now):
                continue
            reported = _nonsense(page, self.rng) if self.around.lying and now > 0 else page
            self._router.scraped(role, index, reported, now, now)
        self.after(self.around.scrape_interval, self._scrape)

    def _is_mute(self, role: Role, index: int, now: float) -> bool:
        """Draw whether an engine cannot be read in the present turn, for each engine apart."""
        turn = int(now / _MUTE_SECONDS)
        return turn > 0 and Random(f"mute {self._seed} {role} {index} {turn}").random() < self.around.mute


class EngineRanks:
    """Schedule as engines do without a router, on random engines.

    On prefill it is the rank that a random room leads to, on decode the next one in turn.
    """

    def __init__(self, fleet: Fleet, rng: Random) -> None:
        self._fleet = fleet
        self._rng = rng
        self._turns = [0] * fleet.decode

    def place(self) -> Placement:
        """Schedule a request, whatever its size."""
        decode = self._rng.randrange(self._fleet.decode)
        return Placement(
            self._rng.randrange(self._fleet.prefill) if self._fleet.prefill else 0,
            self._rng.randrange(self._fleet.ranks),
            decode,
            self.decode_rank(decode),
        )

    def decode_rank(self, engine: int) -> int:
        """Return the rank that a decode engine picks when the request names none."""
        self._turns[engine] = (self._turns[engine] + 1) % self._fleet.ranks
        return self._turns[engine]


def _nonsense(page: LoadPage, rng: Random) -> LoadPage:
    samples = list(page.ranks)
    rng.shuffle(samples)
    return LoadPage(
        tuple(
            type(sample)(
                rank,
                used_tokens=round(sample.used_tokens * rng.uniform(0, 3)),
                total_tokens=None if sample.total_tokens is None else round(sample.total_tokens * rng.uniform(0, 3)),
                waiting_uncached_tokens=rng.randrange(20_000),
                running_requests=rng.randrange(2 * sample.running_requests + 1),
                waiting_requests=rng.randrange(5),
                capacity_tokens=sample.capacity_tokens,
                tokens_per_second=rng.choice([None, 1e-3, 1e9, rng.uniform(0, 2000)]),
                decoded=sample.decoded and replace(sample.decoded, seconds=sample.decoded.seconds * rng.uniform(0, 3)),
                age=sample.age,
            )
            for rank, sample in enumerate(samples)
        ),
        None if page.prompt_tokens is None else round(page.prompt_tokens * rng.uniform(0, 3)),
    )
