"""The load of prefill ranks: prompt tokens that have not started yet, and what a further prompt costs.

All ranks of a group start each step together, and a step takes as long as its fullest rank. Tokens in the running step
therefore delay a new request equally on every rank, and only break ties. What counts are the tokens that wait.
Engines do not report when a step ends, but the response of a prefill leg shows it: a step has ended then, and what had
reached the engine by then has started, rank by rank, first in first out. A step that has only parts of long prompts
ends without a response, so its measured time counts.
"""

import math
from collections import deque
from typing import Final

from dp_extproc.engines.model import RankSample
from dp_extproc.load.records import Work
from dp_extproc.load.step_group import RankLoad, Reservation, StepGroup

RUNNING_WEIGHT: Final = 0.25
"""Weight of tokens in the running step. With 0 a busy rank looks like an idle one; with 1 they count like waiting ones.
Simulated on 4 prefill engines of 8 ranks, mean time to first token: 2283 ms with 0, 1449 with 0.25, 1868 with 1."""
WAITING_COUNTED: Final = 4
"""Bound on the waiting requests that a longer step is assumed to delay. Simulated, mean time to first token: 1505 ms
with 1, 1449 with 4, 1460 without a bound; without chunks 4585, 3070 and 2853."""
LATER_WEIGHT: Final = 0.75
"""Weight of the delay that a longer queue causes to later requests. Simulated without chunks, mean time to first token:
2633 ms with 0, 1916 with 0.75, 1806 with 1."""
LATER_STEPS: Final = 2
"""Bound on the delay of later requests, in full steps: they run beside a longer queue, on another rank. Without it long
prompts pile up on one rank, because each idle engine seems worth a delay of seconds."""
ARRIVAL_LAG: Final = 0.02
"""Seconds from the pick until an engine can start a request (network, tokenizing, handshake with decode), and from the
end of a step until its response arrives. Simulated, mean time to first token: 1528 ms with 0, 1449 with 0.06, 1373 with
0.25; without chunks 3471, 3070 and 2606; with the lengths of the seed 989, 968 and 1032."""
QUIET_SECONDS: Final = 1.0
"""Count requests older than this as started, if their step group had no event for as many seconds. If the expected time
of the running step is longer, it counts instead."""
_EXPIRY_SECONDS: Final = 4.0
"""Count a request as computed this many seconds after the last event of its step group, and as many times what the
tokens up to its own may take."""
USUAL_TIME_PER_TOKEN: Final = 1 / 6000
"""Seconds per prompt token of a rank. It bounds the expected time from below, and is longer than on most engines."""
_PATIENCE: Final = 3.0
"""How many times longer than measured a step may take before its events count as lost."""
_SMOOTHING: Final = 0.3
"""Weight of the newest measurement in the mean time per prompt token."""
_CAPACITY_MEMORY: Final = 0.98
"""Weight of all earlier responses in the mean pace at each further one. It is the mean of about 50 responses: capacity
changes slowly, and an autoscaler acts on each change."""


class PrefillGroup(StepGroup):
    """Prefill ranks with a common step."""

    __slots__ = (
        "_budget", "_busy_since", "_chunked", "_delayed_per_step", "_external_waiting", "_external_waiting_by_rank",
        "_last_event", "_later_counted", "_measured", "_overdue_per_token", "_queues", "_rest_of_step", "_running",
        "_shares_served", "_step_began", "_step_cost", "_step_length", "_steps_capacity", "_time_per_token",
        "_uncomputed", "_unstarted", "_waiting", "waits_for_decode",
    )  # fmt: skip

    def __init__(self, indices: range, *, budget: float, chunked: bool, step_cost: float) -> None:
        """Begin without load.

        Args:
            indices: DP ranks of the engine.
            budget: Prompt tokens per rank and step.
            chunked: Whether the engine cuts a prompt beyond the budget into several steps; if not, it runs alone.
            step_cost: The fixed time of a step, in prompt tokens that take as long.
        """
        super().__init__(indices)
        self._budget = budget
        self._chunked = chunked
        self._step_cost = step_cost
        self._later_counted = LATER_STEPS * budget if chunked else math.inf
        """Bound on the tokens of a longer queue that count as a delay of later requests."""
        self._queues: list[deque[Reservation]] = [deque() for _ in self.ranks]
        """Per rank, reservations whose prompts are not computed yet, in the order of their picks."""
        self._waiting = [0.0] * len(self.ranks)
        """Per rank, prompt tokens that have not started."""
        self._running = [0.0] * len(self.ranks)
        """Per rank, prompt tokens in the running step."""
        self._unstarted = 0.0
        """Requests of which no token has started."""
        self._external_waiting = 0.0
        """External requests that wait, by the samples of all ranks: the sum of the next list."""
        self._external_waiting_by_rank = [0.0] * len(self.ranks)
        self._uncomputed = 0
        """Reservations whose prompts are not computed yet."""
        self._step_length = 0.0
        """Prompt tokens of the fullest rank in the running step."""
        self._rest_of_step = 0.0
        """Expected rest of the running step, in tokens, as of :meth:`survey`: a half of it."""
        self._steps_capacity = budget
        """Tokens that the steps of the fullest rank's queue could compute, as of :meth:`survey`."""
        self._delayed_per_step = 0.0
        """Waiting requests per step, at most WAITING_COUNTED in all, as of :meth:`survey`."""
        self._last_event = -math.inf
        self._busy_since = -math.inf
        """When the engine began to work again after it had been idle."""
        self._shares_served = -math.inf
        """When a request with shares on all ranks was served the last time: its shares end one by one, at one time."""
        self._step_began = -math.inf
        self._time_per_token: float | None = None
        """Mean seconds per prompt token, measured by events."""
        self._measured = (0.0, 0.0)
        """Seconds of measured steps, and the tokens that they took, fixed costs included. Older ones count less."""
        self.waits_for_decode = False
        """Whether decode has no room. Prompts then wait for it, so their times do not show how fast prefill is."""
        self._overdue_per_token = USUAL_TIME_PER_TOKEN
        """Seconds per prompt token after which the next event is overdue."""

    def cost(self, position: int, after: float) -> float:  # noqa: ARG002 - the same for every rank
        """Return what it costs to have a rank at *after* tokens, for the request itself and for the other requests.

        The request is done after the rest of the running step and ``ceil(after / budget)`` more steps of its rank. Each
        step is as long as the fullest rank makes it. If the request makes its rank the fullest one, steps get longer
        for the requests that wait here, and more numerous for those that follow.
        """
        top = self.top
        steps = -(-after // self._budget)
        if after <= top:
            full = steps * self._budget
            # Here and below without min and max: this is called for each rank of each decision, and calls cost most.
            own = self._rest_of_step + steps * self._step_cost + (top if top < full else full)  # noqa: FURB136
            return own * self.slowness
        lengthened = (after if after < self._steps_capacity else self._steps_capacity) - top  # noqa: FURB136
        later = after - top
        if later > self._later_counted:  # noqa: PLR1730
            later = self._later_counted
        own = self._rest_of_step + steps * self._step_cost + after
        return (own + self._delayed_per_step * lengthened + LATER_WEIGHT * later) * self.slowness

    def bound(self) -> None:
        steps = -(-self.top // self._budget) or 1.0
        self._steps_capacity = steps * self._budget
        self._delayed_per_step = min(self._unstarted + self._external_waiting, WAITING_COUNTED) / steps
        self._rest_of_step = (self._step_cost + self._step_length) / 2 if self._uncomputed else 0.0
        self.floor = (self._rest_of_step + self._step_cost + min(self.top, self._budget)) * self.slowness
        self.base = (self._rest_of_step + self._step_cost + self.low) * self.slowness

    def refresh(self, now: float) -> None:
        """Count old requests as started, and very old ones as computed, if there was no event for a while.

        Of each rank, no more than one step can compute counts as started: the next response ends what runs.
        """
        while (end := self._silent_end) <= now:
            self._step(end)
        overdue = max(QUIET_SECONDS, self._overdue_per_token * self._step_length)
        quiet = now - self._last_event
        if self._uncomputed and quiet >= overdue:
            for position, queue in enumerate(self._queues):
                ahead = 0.0
                for reservation in list(queue):
                    own = reservation.waiting + reservation.running
                    ahead += own
                    age = now - reservation.since
                    patience = _EXPIRY_SECONDS * (1 + self._overdue_per_token * max(ahead, self._step_length))
                    if min(age, quiet) >= patience:
                        queue.remove(reservation)
                        self._computed(reservation, now)
                    elif (
                        age >= overdue and reservation.waiting and (room := self._budget - self._running[position]) > 0
                    ):
                        self._start(reservation, room)
        later = max(now + QUIET_SECONDS / 4, self._last_event + overdue) if self._uncomputed else math.inf
        self.due = min(later, self._silent_end)

    @property
    def _silent_end(self) -> float:
        """When the running step ends, if no response will show it, as each rank computes a part of a long prompt."""
        if not self._step_length or self._time_per_token is None or not self._chunked:
            return math.inf
        for queue in self._queues:
            if queue and queue[0].running and not queue[0].waiting:
                return math.inf
        return self._step_began + self._time_per_token * (self._step_length + self._step_cost)

    @property
    def waiting(self) -> Work:
        """The prompts of all ranks that no step has taken in yet, with external ones."""
        tokens = sum(self._waiting) + sum(self.external)
        return Work(max(0.0, tokens), max(0.0, self._unstarted + self._external_waiting))

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt tokens that all ranks together compute per second in full steps; None if that was not measured."""
        seconds, tokens = self._measured
        if seconds <= 0:
            return None
        return len(self.ranks) * tokens / seconds * self._budget / (self._budget + self._step_cost)

    def tokens_in(self, sample: RankSample) -> float:
        if sample.waiting_uncached_tokens is not None:
            return sample.waiting_uncached_tokens
        if sample.total_tokens is not None:
            return max(0, sample.total_tokens - sample.used_tokens)
        return sample.used_tokens  # releases before 0.5.11 do not report queued work

    def tokens_at(self, reservation: Reservation, at: float) -> float:  # noqa: ARG002
        return reservation.to_compute

    def misestimated(self, excess: float, tokens: float) -> float:  # noqa: ARG002
        return 0.0  # any difference ends with our requests, which is sooner than the next sample

    def _learn(self, position: int, sample: RankSample, at: float) -> None:
        pass  # the time per prompt token is measured by events

    def _set_external(self, rank: RankLoad, tokens: float, now: float) -> None:  # noqa: ARG002
        position, by_rank = rank.position, self._external_waiting_by_rank
        self.external[position] = tokens
        self._sum_up(position)
        waiting = min(rank.external_requests, rank.sample.waiting_requests) if rank.sample is not None else 0.0
        self._external_waiting = max(0.0, self._external_waiting + waiting - by_rank[position])
        by_rank[position] = waiting

    def first_token(self, reservation: Reservation, now: float) -> None:
        """Do nothing: output tokens are no work of prefill ranks."""

    def _open(self, reservation: Reservation, now: float) -> None:
        position, to_compute = reservation.rank.position, reservation.to_compute
        reservation.waiting = to_compute
        idle = not self._uncomputed
        if idle:
            self._busy_since = self._step_began = now
        elif reservation.is_share:  # the group was idle, too, if an earlier share of the same request made it busy
            idle = self._busy_since == now and not self._queues[position]
        self._uncomputed += 1
        self._unstarted += reservation.requests
        self._queues[position].append(reservation)
        self._waiting[position] += to_compute
        if idle:
            self._last_event = now
            self._run(reservation, min(to_compute, self._budget) if self._chunked else to_compute)
            self._step_length = max(self._step_length, reservation.running)
        else:
            self._sum_up(position)
        if self.due == math.inf:
            self.due = now + QUIET_SECONDS
        if idle:
            self.due = min(self.due, self._silent_end)

    def _close(self, reservation: Reservation, now: float, *, served: bool) -> None:
        if served:
            self._last_event = now
        if reservation.until != math.inf:
            return  # another response of its step has ended it before
        queue = self._queues[reservation.rank.position]
        if not served:  # the running step and the other queues go on
            queue.remove(reservation)
            self._computed(reservation, now)
            if self._uncomputed and not any(self._running):
                self._step_began = now
                self._fill(math.inf)  # the running step had this request alone
            return
        self._measure(reservation, now)
        if reservation.is_share:  # which queue it was in is unknown, and all shares together are one response
            queue.remove(reservation)
            self._computed(reservation, now)
            if self._shares_served != now:
                self._shares_served = now
                self._step(now)
            return
        while queue[0] is not reservation:  # first in, first out: what was queued before it is computed, too
            self._computed(queue.popleft(), now)
        queue.popleft()
        self._computed(reservation, now)
        self._step(now)

    def _measure(self, reservation: Reservation, now: float) -> None:
        """Measure by a response how long tokens take: those of the running step, and of steps without a response."""
        work = 0.0
        for each in self._queues[reservation.rank.position]:
            work += each.waiting + each.running
            if each is reservation:
                break
        work = max(work, self._step_length, 1.0)  # less than a token is a rounding error
        steps = -(-work // self._budget) if self._chunked else 1.0
        elapsed, work = now - self._step_began, work + max(1.0, steps) * self._step_cost
        if not self.waits_for_decode:
            seconds, tokens = self._measured
            self._measured = _CAPACITY_MEMORY * seconds + elapsed, _CAPACITY_MEMORY * tokens + work
        measured = elapsed / work
        before = self._time_per_token
        self._time_per_token = measured if before is None else before + (measured - before) * _SMOOTHING
        self._overdue_per_token = max(USUAL_TIME_PER_TOKEN, _PATIENCE * self._time_per_token)

    def _step(self, now: float) -> None:
        """End the running step, and begin another one with what had arrived by then."""
        self._step_began = now
        for position, queue in enumerate(self._queues):
            while queue and queue[0].running and not queue[0].waiting:
                self._computed(queue.popleft(), now)
            if queue and queue[0].running:
                self._running[position] -= queue[0].running
                queue[0].running = 0.0
                self._sum_up(position)
        self._fill(now - ARRIVAL_LAG)
        if self._uncomputed and not self._step_length:
            self._fill(math.inf)  # the engine has only requests on their way: they start when they arrive
        self.due = min(self.due, self._silent_end)

    def _fill(self, arrived: float) -> None:
        """Take waiting tokens into the running step, of requests that were picked until *arrived*."""
        for queue in self._queues:
            budget = self._budget
            for reservation in queue:
                if budget <= 0 or reservation.since > arrived:
                    break
                budget -= self._start(reservation, budget)
        self._step_length = max(self._running)

    def _start(self, reservation: Reservation, budget: float) -> float:
        """Take what a step has room for into it. Returns that, or all its room if the request needs the next step."""
        taken = reservation.waiting
        if taken > budget:
            if self._chunked:
                taken = budget
            elif budget < self._budget:
                return budget
        self._run(reservation, taken)
        return taken

    def _run(self, reservation: Reservation, tokens: float) -> None:
        """Take some tokens of a request into the running step."""
        if reservation.waiting == reservation.to_compute:
            self._unstarted -= reservation.requests
        reservation.waiting -= tokens
        reservation.running += tokens
        position = reservation.rank.position
        self._waiting[position] -= tokens
        self._running[position] += tokens
        self._sum_up(position)

    def _computed(self, reservation: Reservation, now: float) -> None:
        """Count a request as computed that is no longer in its queue."""
        if reservation.waiting == reservation.to_compute:
            self._unstarted -= reservation.requests
        position = reservation.rank.position
        if self._queues[position]:
            self._waiting[position] -= reservation.waiting
            self._running[position] -= reservation.running
        else:  # exactly zero, whatever floating point made of the sums
            self._waiting[position] = self._running[position] = 0.0
        reservation.waiting = reservation.running = 0.0
        reservation.until = now
        self._uncomputed -= 1
        if not self._uncomputed:
            self._unstarted = self._step_length = 0.0
        self._sum_up(position)

    def _sum_up(self, position: int) -> None:
        waiting = self.external[position] + self._waiting[position]
        self.set_load(position, waiting + RUNNING_WEIGHT * self._running[position])
