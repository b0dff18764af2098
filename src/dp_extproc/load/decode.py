"""The load of decode ranks: the context that attention reads in every step, and what a further sequence costs.

Every sequence of an engine gets one token per step, and a step takes as long as its fullest rank. The time of a rank
grows with the tokens of its sequences, prompt and output so far, and with their number: a fixed cost for each.
"""

import math
from typing import Final

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.decode_pace import DEFAULT_TPOT, ODD_PACE, DecodePace, within
from dp_extproc.estimators.sample_trust import SampleTrust
from dp_extproc.load.step_group import EXTERNAL_FROM, RankLoad, Reservation, StepGroup

ROOM: Final = 0.85
"""Share of the KV cache that may be reserved. A sequence beyond it waits, and makes prefill wait for it."""
_NO_ROOM: Final = 1e12
"""Cost in tokens, more than any load: a rank without room costs more than every rank that has some."""
JOINT_DELAY: Final = 0.3
"""Weight of the load that a sequence adds, per sequence of the engine that it slows down."""
GROWTH_COUNTED: Final = 20
"""Bound on the sequences that count as slowed by the growth of the fullest rank: the more sequences an engine has, the
sooner new ones fill what that rank leaves below it. Simulated on 2 decode engines of 8 ranks, TPOT below that of the
engines' own picks, of all sequences and of the longest tenth: 10.4 and 4.7 % with 20, 10.3 and 4.3 with 30, 10.6 and
3.7 with 40; on 8 engines of 32 ranks 11.2 and 5.4, 11.6 and 2.9, 11.9 and 1.4 %."""
_GROWTH_INTERVAL: Final = 0.25
"""Seconds between two updates of the growth of running sequences, in which each grows by a few tokens."""
_TRUSTED: Final = 0.5
"""Share of the reserved tokens that an engine's lower count may take back, so that a wrong count leaves a half."""
_LIFETIME: Final = 3600.0
"""Seconds before which no sequence expires."""
_MOST_TOKENS: Final = 1 << 20
"""Bound on the output tokens of a sequence, if the KV cache of its rank is unknown. A sequence that is older than so
many tokens take has ended, though its event was lost."""
_SWEEP_INTERVAL: Final = 60.0
"""Seconds between two searches for sequences that are too old."""


def step_cost(top: float, after: float, added_per_rank: float, slowed: float) -> float:
    """Return what a new sequence costs itself and the sequences that it slows down, in tokens of context.

    The growth of the fullest rank slows all sequences at once. A sequence that fits below it takes room that later ones
    will lack. If that were free, all long sequences would go where long ones are already.

    Args:
        top: Load of the engine's fullest rank.
        after: Load of the sequence's rank, with the sequence.
        added_per_rank: Load that the sequence adds to its engine, per rank.
        slowed: Sequences that the engine has already.
    """
    new = max(top, after)
    return new + JOINT_DELAY * (min(slowed, GROWTH_COUNTED) * (new - top) + slowed * added_per_rank)


class DecodeGroup(StepGroup):
    """Decode ranks, or ranks that do both prefill and decode, with a common step."""

    __slots__ = (
        "_computes", "_external_extra", "_extra", "_first_tokens", "_growing", "_prompts", "_request_tokens",
        "_room", "_swept", "_trust", "pace", "tpot", "usual_tpot",
    )  # fmt: skip

    def __init__(self, indices: range, *, request_tokens: float, computes: bool = False) -> None:
        """Begin without load.

        Args:
            indices: DP ranks of the engine.
            request_tokens: The fixed cost of a sequence in a step, in tokens of context that cost as much.
            computes: Whether these ranks compute the prompts, too. Such tokens count twice until the first token.
        """
        super().__init__(indices)
        self.tpot = DEFAULT_TPOT
        """Seconds per output token: what the engine reports, near the usual one."""
        self.usual_tpot = DEFAULT_TPOT
        """Seconds per output token that are usual for endpoints of the same pool and role."""
        self.pace = DecodePace(len(self.ranks))
        self._trust = SampleTrust(len(self.ranks))
        self._swept = -math.inf
        """When sequences that are too old were last looked for."""
        self._request_tokens = request_tokens
        self._computes = computes
        size = len(self.ranks)
        self._prompts = [0.0] * size
        """Per rank, prompt tokens of all open reservations."""
        self._extra = [0.0] * size
        """Per rank, fixed costs of sequences, and prompt tokens that are still to be computed, which count twice."""
        self._external_extra = [0.0] * size
        """Per rank, fixed costs of external sequences."""
        self._growing = [0.0] * size
        """Per rank, sequences that have had their first token."""
        self._first_tokens = [0.0] * size
        """Per rank, the sum of the times of those first tokens."""
        self._room = [math.inf] * size
        """Per rank, tokens of KV cache that may be reserved."""

    def cost(self, position: int, after: float) -> float:
        """Return what it costs the group to have a rank at *after* tokens and one more sequence (:func:`step_cost`)."""
        held = after - self._extra[position] - self._external_extra[position]  # fixed costs take no KV cache
        penalty = _NO_ROOM if held > self._room[position] else 0.0
        added = after - self.loads[position] + self._request_tokens
        slowed = self.requests + self.external_requests
        cost = step_cost(self.top, after + self._request_tokens, added / len(self.loads), slowed)
        return cost * self.slowness + penalty

    def bound(self) -> None:
        self.floor = self.top * self.slowness
        self.base = (self.low + self._request_tokens) * self.slowness

    def refresh(self, now: float) -> None:
        """Add the tokens that running sequences have got since, and expire sequences that are too old."""
        if now - self._swept >= _SWEEP_INTERVAL:
            self._sweep(now)
        numbers = zip(self.external, self._prompts, self._extra, self._growing, self._first_tokens, strict=True)
        loads = [
            external + prompts + extra + (growing * now - first_tokens) / self.tpot
            for external, prompts, extra, growing, first_tokens in numbers
        ]
        self.set_loads([load if load > 0 else 0.0 for load in loads])
        self.due = now + _GROWTH_INTERVAL if self.requests > 0 else math.inf

    def tokens_in(self, sample: RankSample) -> float:
        return sample.tokens

    def tokens_at(self, reservation: Reservation, at: float) -> float:
        return reservation.tokens + max(0.0, at - reservation.first_token_at) * reservation.requests / self.tpot

    def misestimated(self, excess: float, tokens: float) -> float:
        return max(-_TRUSTED * tokens, excess)  # sequences last long, and an engine counts better than we estimate

    def kv_tokens(self, position: int, now: float) -> float:
        """Return the tokens that the sequences of a rank take in its KV cache, or will take when they have started."""
        external = self.external[position] - self._external_extra[position]
        return max(0.0, external + self._prompts[position] + self._grown(position, now))

    def _learn(self, position: int, sample: RankSample, at: float) -> None:
        if sample.capacity_tokens:
            self._room[position] = ROOM * sample.capacity_tokens
        self.pace.learn(position, sample, at)
        self._set_tpot()

    def _set_external(self, rank: RankLoad, tokens: float, now: float) -> None:
        position, fixed = rank.position, self._request_tokens * rank.external_requests
        correction = tokens + fixed - self.external[position]
        is_empty = rank.sample is not None and rank.sample.is_empty
        self.external[position] += self._trust.weigh(position, correction, is_empty=is_empty)
        self._external_extra[position] = min(fixed, max(0.0, self.external[position]))
        self._sum_up(position, now)

    def first_token(self, reservation: Reservation, now: float) -> None:
        if reservation.first_token_at != math.inf or reservation not in reservation.rank.open:
            return
        position, reservation.first_token_at = reservation.rank.position, now
        self._growing[position] += reservation.requests
        self._first_tokens[position] += reservation.requests * now
        self._extra[position] -= reservation.to_compute
        self._sum_up(position, now)

    def _sweep(self, now: float) -> None:
        """Expire reservations that are older than any sequence can be."""
        self._swept = now
        for rank in self.ranks:
            known = rank.sample.capacity_tokens if rank.sample is not None else None
            lifetime = max(_LIFETIME, self.tpot * (2 * known if known else _MOST_TOKENS))
            for lost in [each for each in rank.open if now - each.since > lifetime]:
                self.expire(lost, now)

    def compare_with(self, tpot: float, slowness: float) -> None:
        """Set the usual seconds per output token of the pool and role, and how many times longer this engine takes."""
        self.usual_tpot = tpot
        self._set_tpot()
        if slowness != self.slowness:
            self.slowness = slowness
            self.changed = True

    def _set_tpot(self) -> None:
        if (reported := self.pace.reported) is not None:
            self.tpot = within(reported, self.usual_tpot, ODD_PACE)

    def _open(self, reservation: Reservation, now: float) -> None:
        if not self._computes:
            reservation.to_compute = 0.0
        position = reservation.rank.position
        self._prompts[position] += reservation.tokens
        self._extra[position] += self._request_tokens * reservation.requests + reservation.to_compute
        self._sum_up(position, now)
        if self.due == math.inf:
            self.due = now + _GROWTH_INTERVAL

    def _close(self, reservation: Reservation, now: float, *, served: bool) -> None:
        position = reservation.rank.position
        if served and reservation.first_token_at != math.inf:
            self.pace.ended(now - reservation.first_token_at)
        if reservation.rank.external_requests < EXTERNAL_FROM:
            # The sample corrected our own estimate, so the correction ends with our requests.
            prompts = self._prompts[position] if reservation.rank.open else 0.0
            self.external[position] *= max(0.0, 1 - reservation.tokens / prompts) if prompts else 0.0
        if not reservation.rank.open:  # exactly zero, whatever floating point made of the sums
            self._prompts[position] = self._extra[position] = 0.0
            self._growing[position] = self._first_tokens[position] = 0.0
        else:
            self._prompts[position] -= reservation.tokens
            self._extra[position] -= self._request_tokens * reservation.requests
            if reservation.first_token_at == math.inf:
                self._extra[position] -= reservation.to_compute
            else:
                self._growing[position] -= reservation.requests
                self._first_tokens[position] -= reservation.requests * reservation.first_token_at
        self._sum_up(position, now)

    def _sum_up(self, position: int, now: float) -> None:
        load = self.external[position] + self._prompts[position] + self._extra[position] + self._grown(position, now)
        self.set_load(position, max(0.0, load))

    def _grown(self, position: int, now: float) -> float:
        """Return the output tokens that the running sequences of a rank have got since their first ones."""
        return (self._growing[position] * now - self._first_tokens[position]) / self.tpot
