"""Let ranks step together.

With DP attention the ranks of an engine run every forward pass together: a rank without work runs an idle batch, and
the step takes as long as the fullest rank needs. Without it every replica is a group of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.rank import Rank
from dp_extproc.lab.engine.scheduler.work import Output, Work


class Batch(Enum):
    """The work of a rank in a step."""

    PREFILL = "prefill"
    DECODE = "decode"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has begun."""

    seconds: float
    batches: tuple[Batch, ...]
    """One per rank of the group."""


class Group:
    """A step group: ranks with a common step."""

    def __init__(self, ranks: Sequence[Rank], costs: Costs) -> None:
        """Start with *ranks*; their state is changed by calls to the group and to the ranks alike."""
        self.ranks = list(ranks)
        self.costs = costs
        self.steps = 0
        self.seconds = 0.0
        """Seconds of all steps, unscaled."""
        self.waited = 0.0
        """Seconds of them in which the average rank waited for the fullest one."""
        self._decoding: list[list[Work]] = [[] for _ in self.ranks]

    def begin(self, now: float) -> tuple[Step | None, list[Output]]:
        """Choose what every rank does next.

        Returns:
            The step, None if no rank has work; and the tokens that are known at once: the first on decode.
        """
        outputs = [output for rank in self.ranks for output in rank.merge_arrived(now)]
        tokens = [rank.plan_prefill(now) for rank in self.ranks]
        self._decoding = [[] if prefill else rank.decoding() for rank, prefill in zip(self.ranks, tokens, strict=True)]
        batches = tuple(
            Batch.PREFILL if prefill else Batch.DECODE if decode else Batch.IDLE
            for prefill, decode in zip(tokens, self._decoding, strict=True)
        )
        seconds = self.costs.prefill_seconds(tokens) if any(tokens) else 0.0
        context = [sum(work.context for work in batch) for batch in self._decoding]
        requests = [len(batch) for batch in self._decoding]
        if any(requests):
            seconds = max(seconds, self.costs.decode_seconds(requests, context))
        if not seconds:
            return None, outputs
        self._account(seconds, [*map(self.costs.own_seconds, tokens, requests, context)])
        return Step(seconds, batches), outputs

    def finish(self) -> list[Output]:
        """Apply the results of the step that :meth:`begin` chose."""
        outputs: list[Output] = []
        for rank, batch in zip(self.ranks, self._decoding, strict=True):
            outputs += rank.finish_prefill()
            outputs += rank.finish_decode(batch)
        self._decoding = [[] for _ in self.ranks]
        return outputs

    def _account(self, seconds: float, own: Sequence[float]) -> None:
        self.steps += 1
        self.seconds += seconds
        fullest = max(own)
        self.waited += seconds * (1 - sum(own) / len(own) / fullest) if fullest else 0.0
