"""The load of prefill ranks: prompt tokens that have not started yet.

All ranks of a group start each step together, and the step takes as long as its fullest rank. Tokens inside the
running step therefore delay a new request alike on every rank, and are (but for a tie) no reason to prefer another
one. What counts are the tokens that wait. Nobody tells when a step ends, but the answer of a prefill leg does: then a
step has ended, and whatever had reached the server by then has started, rank by rank, first in first out.
"""

import math
from collections import deque
from typing import Final

from dp_extproc.engines.model import RankSample
from dp_extproc.load.step_group import RankLoad, Reservation, StepGroup

RUNNING_WEIGHT: Final = 0.25
"""Of tokens in the running step. Without it nothing tells a busy rank from an idle one; with 1 the rule above is lost.
Simulated on 4 prefill servers of 8 ranks, mean time to first token: 2283 ms with 0, 1449 with 0.25, 1868 with 1."""
WAITING_COUNTED: Final = 4
"""At most so many waiting requests are taken to be delayed by a longer step. Simulated, mean time to first token: 1505
ms with 1, 1449 with 4, 1460 without a limit; without chunks 4585, 3070 and 2853."""
LATER_WEIGHT: Final = 0.75
"""Of what a longer queue costs those who are still to come. Simulated without chunks, mean time to first token: 2633 ms
with 0, 1916 with 0.75, 1806 with 1."""
LATER_STEPS: Final = 2
"""They are delayed by so many full steps at most: who comes later runs beside a longer queue on another rank. Without
this bound long prompts are stacked on one rank, as if every idle server were worth a detour of seconds."""
ARRIVAL_LAG: Final = 0.02
"""Seconds from the pick until an engine can start a request: the network, tokenizing, the handshake with decode; and
from the end of a step to the answer. Simulated, mean time to first token: 1528 ms with 0, 1449 with 0.06, 1373 with
0.25; without chunks 3471, 3070 and 2606; with the lengths of the seed 989, 968 and 1032."""
SILENCE: Final = 1.0
"""Seconds without any event, at least, after which time alone tells: older requests count as started."""
_FORGET_SECONDS: Final = 4.0
"""Likewise, after which they are forgotten. To both comes what the tokens before them should take."""
_USUAL_PACE: Final = 1 / 6000
"""Seconds per prompt token of a rank; slower than most, and the least that a server is given."""
_PATIENCE: Final = 3.0
"""How many times longer than by its own pace a server may take."""
_SMOOTHING: Final = 0.3


class PrefillReservation(Reservation):
    """A prompt on its way through prefill."""

    __slots__ = ("running", "waiting")

    def __init__(self, rank: RankLoad, tokens: float, requests: float, since: float) -> None:
        super().__init__(rank, tokens, requests, since)
        self.waiting = tokens
        """Tokens that no step has taken in yet."""
        self.running = 0.0
        """Tokens in the running step."""

    @property
    def is_computed(self) -> bool:
        return self.until != math.inf


class PrefillGroup(StepGroup):
    """Prefill ranks with a common step."""

    __slots__ = (
        "_began", "_budget", "_chunked", "_delayed", "_full", "_last_event", "_most_later", "_pace", "_queues",
        "_running", "_runs", "_shared_step", "_shown_pace", "_step_began", "_step_tokens", "_strange", "_strangers",
        "_uncomputed", "_unstarted", "_waited", "_waiting",
    )  # fmt: skip

    def __init__(self, indices: range, *, budget: float, chunked: bool, step_tokens: float) -> None:
        """Begin with empty books.

        Args:
            indices: DP ranks of the server.
            budget: Prompt tokens per rank and step.
            chunked: Whether a prompt beyond the budget is cut into several steps; if not, it runs alone.
            step_tokens: The fixed time of a step, in tokens that could be computed in it.
        """
        super().__init__(indices)
        self._budget = budget
        self._chunked = chunked
        self._step_tokens = step_tokens
        self._most_later = LATER_STEPS * budget if chunked else math.inf
        self._queues: list[deque[PrefillReservation]] = [deque() for _ in self.ranks]
        """Per rank, in the order in which they were sent, what is not computed yet."""
        self._waiting = [0.0] * len(self.ranks)
        """Per rank, tokens that have not started."""
        self._runs = [0.0] * len(self.ranks)
        """Per rank, tokens in the running step."""
        self._unstarted = 0.0
        """Requests of which nothing has started."""
        self._strangers = 0.0
        """Likewise of others, by the samples ..."""
        self._strange = [0.0] * len(self.ranks)
        """... and per rank."""
        self._uncomputed = 0
        self._running = 0.0
        """Tokens of the fullest rank in the running step."""
        self._waited = 0.0
        """Tokens that are left of the running step, as of :meth:`survey` ..."""
        self._full = budget
        """... the tokens that its fullest rank has in full steps ..."""
        self._delayed = 0.0
        """... and those who wait, as far as they are counted, per step."""
        self._last_event = -math.inf
        self._began = -math.inf
        """When the server had something to do again."""
        self._shared_step = -math.inf
        """When a request in shares was answered the last time."""
        self._step_began = -math.inf
        self._shown_pace: float | None = None
        """Seconds per token, by the events."""
        self._pace = _USUAL_PACE
        """Seconds per token after which something must have happened."""

    def cost(self, position: int, after: float) -> float:  # noqa: ARG002 - the same for every rank
        """Tell what it costs to have a rank at *after* tokens, for the request itself and for everybody else.

        The request is done when its rank has taken ``ceil(after / budget)`` more steps, each of them as long as the
        fullest rank makes it; before that, the running step has to end. If it makes its rank the fullest one, steps
        get longer for those who wait here, and there will be more of them for those who come.
        """
        top = self.top
        steps = -(-after // self._budget)
        if after <= top:
            full = steps * self._budget
            return self._waited + steps * self._step_tokens + (top if top < full else full)  # noqa: FURB136 - here and below calls cost most
        lengthened = (after if after < self._full else self._full) - top  # noqa: FURB136
        later = after - top
        if later > self._most_later:  # noqa: PLR1730
            later = self._most_later
        own = self._waited + steps * self._step_tokens + after
        return own + self._delayed * lengthened + LATER_WEIGHT * later

    def bound(self) -> None:
        steps = -(-self.top // self._budget) or 1.0
        self._full = steps * self._budget
        self._delayed = min(self._unstarted + self._strangers, WAITING_COUNTED) / steps
        self._waited = (self._step_tokens + self._running) / 2 if self._uncomputed else 0.0
        self.floor = self._waited + self._step_tokens + min(self.top, self._budget)
        self.base = self._waited + self._step_tokens + self.low

    def refresh(self, now: float) -> None:
        """Without events for a while, take what is old as started, and what is very old as gone."""
        silence = max(SILENCE, self._pace * self._running)
        quiet = now - self._last_event
        if self._uncomputed and quiet >= silence:
            for queue in self._queues:
                ahead = 0.0
                for reservation in list(queue):
                    own = reservation.waiting + reservation.running
                    ahead += own
                    age = now - reservation.since
                    patience = _FORGET_SECONDS * (1 + self._pace * max(ahead, self._running))
                    if min(age, quiet) >= patience:
                        queue.remove(reservation)
                        self._computed(reservation, now)
                    elif age >= silence and reservation.waiting:
                        self._run(reservation, reservation.waiting)
        self.due = max(now + SILENCE / 4, self._last_event + silence) if self._uncomputed else math.inf

    def told(self, sample: RankSample) -> float:
        if sample.waiting_uncached_tokens is not None:
            return sample.waiting_uncached_tokens
        if sample.total_tokens is not None:
            return max(0, sample.total_tokens - sample.used_tokens)
        return sample.used_tokens  # before 0.5.11 nothing tells of queued work

    def shown(self, reservation: Reservation, at: float) -> float:  # noqa: ARG002 - the same at any time
        return reservation.tokens

    def misjudged(self, excess: float, tokens: float) -> float:  # noqa: ARG002 - whatever they are
        return 0.0  # it will be gone with our requests, which is sooner than the next sample

    def learn(self, position: int, sample: RankSample, at: float) -> None:
        pass  # a prefill server's pace is learned from its answers

    def correct(self, rank: RankLoad, others: float, now: float) -> None:  # noqa: ARG002 - as above
        self.external[rank.position] = others
        self._sum_up(rank.position)
        waiting = min(rank.external_requests, rank.sample.waiting_requests) if rank.sample is not None else 0.0
        self._strangers = max(0.0, self._strangers + waiting - self._strange[rank.position])
        self._strange[rank.position] = waiting

    def _open(
        self,
        rank: RankLoad,
        tokens: float,  # noqa: ARG002 - what is cached costs nothing here
        to_compute: float,
        requests: float,
        now: float,
        *,
        is_share: bool,
    ) -> Reservation:
        reservation = PrefillReservation(rank, to_compute, requests, now)
        position = rank.position
        idle = not self._uncomputed
        if idle:
            self._began = self._step_began = now
        elif is_share:  # as for the one before
            idle = self._began == now and not self._queues[position]
        self._uncomputed += 1
        self._unstarted += requests
        self._queues[position].append(reservation)
        self._waiting[position] += to_compute
        if idle:
            self._last_event = now
            self._run(reservation, min(to_compute, self._budget) if self._chunked else to_compute)
            self._running = max(self._running, reservation.running)
        else:
            self._sum_up(position)
        if self.due == math.inf:
            self.due = now + SILENCE
        return reservation

    def _close(self, reservation: Reservation, now: float, *, worked_off: bool) -> None:
        assert isinstance(reservation, PrefillReservation)  # noqa: S101 - made by _open
        if not worked_off:
            self._leave(reservation, now)
            return
        self._last_event = now
        if reservation.is_computed:
            return  # its step had ended before, by another answer of it
        queue = self._queues[reservation.rank.position]
        self._learn_pace(reservation, now)
        if reservation.is_share:  # nobody knows which queue it was in, and all shares together are one answer
            queue.remove(reservation)
            self._computed(reservation, now)
            if self._shared_step != now:
                self._shared_step = now
                self._step(now)
            return
        while queue[0] is not reservation:  # first in, first out: what was before it is computed, too
            self._computed(queue.popleft(), now)
        queue.popleft()
        self._computed(reservation, now)
        self._step(now)

    def _learn_pace(self, reservation: PrefillReservation, now: float) -> None:
        """Learn from an answer how long tokens take: those of the running step, and of steps that nobody answered."""
        work = 0.0
        for each in self._queues[reservation.rank.position]:
            work += each.waiting + each.running
            if each is reservation:
                break
        work = max(work, self._running, 1.0)  # less than a token is what floating point has left over
        steps = -(-work // self._budget) if self._chunked else 1.0
        pace = (now - self._step_began) / (work + max(1.0, steps) * self._step_tokens)
        before = self._shown_pace
        self._shown_pace = pace if before is None else before + (pace - before) * _SMOOTHING
        self._pace = max(_USUAL_PACE, _PATIENCE * self._shown_pace)

    def _leave(self, reservation: PrefillReservation, now: float) -> None:
        """Take a request out that was given up. The step goes on, and so does all that waits."""
        if reservation.is_computed:
            return
        self._queues[reservation.rank.position].remove(reservation)
        self._computed(reservation, now)
        if self._uncomputed and not any(self._runs):
            self._fill(math.inf)  # it was all that ran

    def _step(self, now: float) -> None:
        """A step has ended, and another has begun with what had arrived by then."""
        self._step_began = now
        for position, queue in enumerate(self._queues):
            while queue and queue[0].running and not queue[0].waiting:
                self._computed(queue.popleft(), now)
            if queue and queue[0].running:
                self._runs[position] -= queue[0].running
                queue[0].running = 0.0
                self._sum_up(position)
        self._fill(now - ARRIVAL_LAG)
        if self._uncomputed and not self._running:
            self._fill(math.inf)  # the server is idle but for those: they start when they arrive

    def _fill(self, arrived: float) -> None:
        for queue in self._queues:
            budget = self._budget
            for reservation in queue:
                if budget <= 0 or reservation.since > arrived:
                    break
                taken = reservation.waiting
                if taken > budget:
                    if self._chunked:
                        taken = budget
                    elif budget < self._budget:
                        break
                self._run(reservation, taken)
                budget -= taken
        self._running = max(self._runs)

    def _run(self, reservation: PrefillReservation, tokens: float) -> None:
        """Let a step take in some tokens."""
        if reservation.waiting == reservation.tokens:
            self._unstarted -= reservation.requests
        reservation.waiting -= tokens
        reservation.running += tokens
        position = reservation.rank.position
        self._waiting[position] -= tokens
        self._runs[position] += tokens
        self._sum_up(position)

    def _computed(self, reservation: PrefillReservation, now: float) -> None:
        """Take a request out that its queue has lost already."""
        if reservation.waiting == reservation.tokens:
            self._unstarted -= reservation.requests
        position = reservation.rank.position
        if self._queues[position]:
            self._waiting[position] -= reservation.waiting
            self._runs[position] -= reservation.running
        else:  # exactly zero, whatever floating point made of the sums
            self._waiting[position] = self._runs[position] = 0.0
        reservation.waiting = reservation.running = 0.0
        reservation.until = now
        self._uncomputed -= 1
        if not self._uncomputed:
            self._unstarted = self._running = 0.0
        self._sum_up(position)

    def _sum_up(self, position: int) -> None:
        self.load_is(
            position, self.external[position] + self._waiting[position] + RUNNING_WEIGHT * self._runs[position]
        )
