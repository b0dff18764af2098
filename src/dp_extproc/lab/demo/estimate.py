"""Estimate how long a demo takes, by the cost model of its engines. Pure."""

import math
import statistics
from collections.abc import Sequence
from typing import Final

from dp_extproc.lab.demo.jobs import Job
from dp_extproc.lab.engine.scheduler.costs import Costs

_CHUNK: Final = 8192
"""Prompt tokens of a step of a whole engine (``--chunked-prefill-size``)."""
_START_ENGINES: Final = 5.0
"""Seconds in which four engines start on two processors."""
_START_ROUTER: Final = 4.0
"""Seconds in which a service and Envoy start, sample every engine once, and stop."""
_QUARTER: Final = 0.25
"""Part of a minute by which the time may exceed the printed minutes."""


def expected_seconds(
    turns: Sequence[Sequence[Job]], concurrency: int, time_scale: float, *, engines: int, ranks: int
) -> float:
    """Estimate the time of a demo on a machine that has nothing else to do.

    Args:
        turns: The jobs of each turn; each has a router of its own.
        concurrency: Requests at a time.
        time_scale: How slow the engines are.
        engines: Engines for prefill, and as many for decode.
        ranks: DP ranks of each engine.
    """
    return _START_ENGINES + sum(
        _START_ROUTER + _turn_seconds(jobs, concurrency, time_scale, engines * ranks, ranks) for jobs in turns
    )


def _turn_seconds(jobs: Sequence[Job], concurrency: int, time_scale: float, all_ranks: int, ranks: int) -> float:
    costs = Costs()
    output = statistics.fmean(job.max_tokens for job in jobs)
    context = statistics.fmean(job.prompt_tokens for job in jobs) + output / 2
    batch = -(-min(concurrency, len(jobs)) // all_ranks)
    step = costs.decode_seconds([batch], [round(batch * context)])
    # A prompt waits for half a step of others on average, and is computed in one or two of its own.
    prefill = 2 * costs.prefill_seconds([_CHUNK // ranks] * ranks)
    request = (prefill + output * step) * time_scale
    # All at a time until none are left to begin; then the last ones end. The warm-up before takes as long as one.
    return len(jobs) / concurrency * request + 2 * request


def in_words(seconds: float) -> str:
    """Return about how long that is; to be done sooner does no harm."""
    minutes = max(1, math.ceil(seconds / 60 - _QUARTER))
    return "about a minute" if minutes == 1 else f"about {minutes} minutes"
