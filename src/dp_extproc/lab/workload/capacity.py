"""Compute the highest rate of a fleet by the cost model of the stand-in, to choose a rate that is a share of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.rank import Limits
from dp_extproc.lab.workload.trace import TraceRequest

_TOPOLOGY: Final = re.compile(r"([1-9]\d*)p([1-9]\d*)d([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Topology:
    """A number of prefill and decode engines, with the same number of DP ranks each."""

    prefill: int
    decode: int
    ranks: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``2p1d8``: two prefill engines, one decode engine, eight ranks each.

        Raises:
            ValueError: It has another form.
        """
        match = _TOPOLOGY.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a topology such as 2p1d8: prefill engines, decode engines, ranks of each"
            )
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.prefill}p{self.decode}d{self.ranks}"


def requests_per_second(
    topology: Topology, costs: Costs, prefill: Limits, decode: Limits, trace: Sequence[TraceRequest]
) -> float:
    """Return how many requests like those of a trace a perfectly balanced fleet serves per second.

    Args:
        topology: Engines and ranks of the fleet.
        costs: Costs of a step.
        prefill: Limits of one prefill rank, with chunks.
        decode: Limits of one decode rank.
        trace: Has the mean lengths. Shared prefixes do not count, so the result is too low with a prefix cache.
    """
    prompt = sum(request.prompt_tokens for request in trace) / len(trace)
    output = sum(request.output_tokens for request in trace) / len(trace)
    step = costs.prefill_seconds([prefill.chunk] * topology.ranks)
    prompts = topology.prefill * topology.ranks * prefill.chunk / step / prompt
    context = prompt + output / 2
    batch = min(decode.max_running, int(decode.capacity / (context + decode.reserved)))
    step = costs.decode_seconds([batch] * topology.ranks, [round(batch * context)] * topology.ranks)
    outputs = topology.decode * topology.ranks * batch / step / output
    return min(prompts, outputs)
