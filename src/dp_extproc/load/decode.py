"""The load of decode ranks: the context that attention reads in every step, and a fixed cost per sequence.

Every sequence of a server gets its next token at the pace of the fullest rank. A rank's share of a step grows with the
tokens of its sequences, prompt and output so far, and with their number.
"""

import math
from typing import Final

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.decode_pace import DEFAULT_TPOT, ODD_PACE, DecodePace, within
from dp_extproc.estimators.sample_trust import SampleTrust
from dp_extproc.load.step_group import SOMEBODY, RankLoad, Reservation, StepGroup

ROOM: Final = 0.85
"""Share of the KV cache that may be promised. Beyond it a sequence waits, and keeps prefill waiting."""
_NO_ROOM: Final = 1e12
"""Tokens; larger than any load, so that a rank without room comes after all that have some."""
JOINT_DELAY: Final = 0.3
"""How much what a sequence adds weighs, per sequence of the server that it slows down."""
GROWTH_COUNTED: Final = 20
"""So many of them at most wait for the growth of the fullest rank: the more sequences a server has, the sooner others
come and fill what that rank leaves below it. Simulated on 2 decode servers of 8 ranks, time per output token below the
engines' own, of all and of the longest tenth: 10.4 and 4.7 % with 20, 10.3 and 4.3 with 30, 10.6 and 3.7 with 40; on 8
servers of 32 ranks 11.2 and 5.4, 11.6 and 2.9, 11.9 and 1.4 %."""
_GROWTH_INTERVAL: Final = 0.25
"""Seconds after which the growth of running sequences is looked at anew. They grow by a few tokens each until then."""
_TRUSTED: Final = 0.5
"""Share of our own books that an engine's count may take back; one that tells nonsense must not empty them."""
_LIFETIME: Final = 3600.0
"""Seconds that a sequence is given in any case ..."""
_MOST_TOKENS: Final = 1 << 20
"""... and as long as so many tokens take, or twice what the KV cache of its rank holds if that is known: no sequence
has more. One that is older has ended, whatever became of the event."""
_SWEEP_INTERVAL: Final = 60.0


def step_cost(top: float, after: float, added_per_rank: float, slowed: float) -> float:
    """Tell what a new sequence costs itself, and those whom it slows down: the fullest rank makes the pace of all.

    They wait for the growth of the fullest rank at once. And whoever fits under it takes room that those who come next
    will lack: were that free, long sequences would all go where there are long ones already.

    Args:
        top: Load of the server's fullest rank.
        after: Load of the sequence's rank, with the sequence.
        added_per_rank: Load that the sequence adds to its server, per rank.
        slowed: Sequences that the server has already.
    """
    new = max(top, after)
    return new + JOINT_DELAY * (min(slowed, GROWTH_COUNTED) * (new - top) + slowed * added_per_rank)


class DecodeReservation(Reservation):
    """A sequence on its way through decode."""

    __slots__ = ("first_token_at", "to_compute")

    def __init__(self, rank: RankLoad, tokens: float, requests: float, since: float, to_compute: float) -> None:
        super().__init__(rank, tokens, requests, since)
        self.to_compute = to_compute
        """Prompt tokens that this very rank has to compute first; 0 on decode servers."""
        self.first_token_at = math.inf

    def started(self, now: float) -> None:
        if self.first_token_at == math.inf and self in self.rank.open:
            self.first_token_at = now
            group = self.rank.group
            assert isinstance(group, DecodeGroup)  # noqa: S101 - that made it
            group.grows(self, now)


class DecodeGroup(StepGroup):
    """Decode ranks, or ranks that do both prefill and decode, with a common step."""

    __slots__ = (
        "_belief",
        "_computes",
        "_external_extra",
        "_extra",
        "_first_tokens",
        "_growing",
        "_prompts",
        "_request_tokens",
        "_room",
        "_swept",
        "pace",
        "tpot",
        "usual_tpot",
    )  # fmt: skip

    def __init__(self, indices: range, *, request_tokens: float, computes: bool = False) -> None:
        """Begin with empty books.

        Args:
            indices: DP ranks of the server.
            request_tokens: The fixed cost of a sequence in a step, in tokens of context that cost as much.
            computes: Whether these ranks compute the prompts, too. Such tokens count twice until the first token.
        """
        super().__init__(indices)
        self.tpot = DEFAULT_TPOT
        """Seconds per output token, by the engine's own account."""
        self.usual_tpot = DEFAULT_TPOT
        """Of the servers of its pool and role."""
        self.pace = DecodePace(len(self.ranks))
        self._belief = SampleTrust(len(self.ranks))
        self._swept = -math.inf
        """When old sequences were looked for."""
        self._request_tokens = request_tokens
        self._computes = computes
        size = len(self.ranks)
        self._prompts = [0.0] * size
        self._extra = [0.0] * size
        """Fixed costs, and prompts to be computed."""
        self._external_extra = [0.0] * size
        """Fixed costs of the sequences of others."""
        self._growing = [0.0] * size
        """Sequences that have had their first token ..."""
        self._first_tokens = [0.0] * size
        """... and the sum of the moments they had it."""
        self._room = [math.inf] * size
        """Tokens of KV cache that may be promised."""

    def cost(self, position: int, after: float) -> float:
        """Tell what it costs the group to have a rank at *after* tokens; see :func:`step_cost`.

        The fixed cost of the new sequence comes on top of them.
        """
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
        """Let the running sequences grow."""
        if now - self._swept >= _SWEEP_INTERVAL:
            self._sweep(now)
        numbers = zip(self.external, self._prompts, self._extra, self._growing, self._first_tokens, strict=True)
        loads = [
            others + prompts + extra + (growing * now - first_tokens) / self.tpot
            for others, prompts, extra, growing, first_tokens in numbers
        ]
        self.loads_are([load if load > 0 else 0.0 for load in loads])
        self.due = now + _GROWTH_INTERVAL if self.requests > 0 else math.inf

    def told(self, sample: RankSample) -> float:
        return sample.tokens

    def shown(self, reservation: Reservation, at: float) -> float:
        assert isinstance(reservation, DecodeReservation)  # noqa: S101 - made by _open
        return reservation.tokens + max(0.0, at - reservation.first_token_at) * reservation.requests / self.tpot

    def misjudged(self, excess: float, tokens: float) -> float:
        return max(-_TRUSTED * tokens, excess)  # sequences last long, and the engine counts better than we estimate

    def learn(self, position: int, sample: RankSample, at: float) -> None:
        if sample.capacity_tokens:
            self._room[position] = ROOM * sample.capacity_tokens
        self.pace.learn(position, sample, at)
        self._keep_pace()

    def correct(self, rank: RankLoad, others: float, now: float) -> None:
        position, fixed = rank.position, self._request_tokens * rank.external_requests
        correction = others + fixed - self.external[position]
        is_empty = rank.sample is not None and rank.sample.is_empty
        self.external[position] += self._belief.weigh(position, correction, is_empty=is_empty)
        self._external_extra[position] = min(fixed, max(0.0, self.external[position]))
        self._sum_up(position, now)

    def grows(self, reservation: DecodeReservation, now: float) -> None:
        """Note that a sequence has had its first token. Strictly for :meth:`DecodeReservation.started`."""
        position = reservation.rank.position
        self._growing[position] += reservation.requests
        self._first_tokens[position] += reservation.requests * reservation.first_token_at
        self._extra[position] -= reservation.to_compute
        self._sum_up(position, now)

    def _sweep(self, now: float) -> None:
        """Take off the books what is older than any sequence can be."""
        self._swept = now
        for rank in self.ranks:
            known = rank.sample.capacity_tokens if rank.sample is not None else None
            lifetime = max(_LIFETIME, self.tpot * (2 * known if known else _MOST_TOKENS))
            for lost in [each for each in rank.open if now - each.since > lifetime]:
                self.expired += 1
                lost.withdraw(now)

    def is_usual(self, tpot: float, slowness: float) -> None:
        """Note what is usual in its pool and role, and how the server compares."""
        self.usual_tpot = tpot
        self._keep_pace()
        if slowness != self.slowness:
            self.slowness = slowness
            self.changed = True

    def _keep_pace(self) -> None:
        if (told := self.pace.told) is not None:
            self.tpot = within(told, self.usual_tpot, ODD_PACE)

    def _open(
        self,
        rank: RankLoad,
        tokens: float,
        to_compute: float,
        requests: float,
        now: float,
        *,
        is_share: bool,  # noqa: ARG002 - all sums are linear
    ) -> Reservation:
        if not self._computes:
            to_compute = 0.0
        self._prompts[rank.position] += tokens
        self._extra[rank.position] += self._request_tokens * requests + to_compute
        self._sum_up(rank.position, now)
        if self.due == math.inf:
            self.due = now + _GROWTH_INTERVAL
        return DecodeReservation(rank, tokens, requests, now, to_compute)

    def _close(self, reservation: Reservation, now: float, *, worked_off: bool) -> None:
        assert isinstance(reservation, DecodeReservation)  # noqa: S101 - made by _open
        position = reservation.rank.position
        if worked_off and reservation.first_token_at != math.inf:
            self.pace.lasted(now - reservation.first_token_at)
        if reservation.rank.external_requests < SOMEBODY:  # what the sample corrected was ours, and goes with ours
            prompts = self._prompts[position]
            self.external[position] *= (
                max(0.0, 1 - reservation.tokens / prompts) if reservation.rank.open and prompts else 0.0
            )
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
        grown = (self._growing[position] * now - self._first_tokens[position]) / self.tpot
        load = self.external[position] + self._prompts[position] + self._extra[position] + grown
        self.load_is(position, max(0.0, load))
