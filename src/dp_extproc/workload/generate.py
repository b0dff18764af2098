"""Makes traces: the same for the same seed."""

from itertools import count
from random import Random
from typing import Final

from dp_extproc.workload.lengths import LENGTHS, Lengths
from dp_extproc.workload.trace import Segment, TraceRequest

SESSIONS: Final = "sessions"
NAMES: Final = (*LENGTHS, SESSIONS)

_BURST_SECONDS: Final = 5.0
_CALM_SECONDS: Final = 15.0
_TURNS: Final = (3, 10)
_THINKING: Final = 12.0
"""Mean seconds between two turns of a conversation."""
_SYSTEM_PROMPTS: Final = (800, 2000, 4000, 6000)


def make_trace(name: str, requests: int, rate: float, seed: int, *, burst: float = 1.0) -> list[TraceRequest]:
    """Make a trace.

    Args:
        name: One of ``NAMES``.
        requests: How many.
        rate: Of arrivals per second, on average.
        seed: Equal ones make equal traces.
        burst: For 5 of every 20 seconds so many times the rate, and less in between; 1 is a Poisson process.
    """
    rng = Random(f"{name} {seed}")
    if name == SESSIONS:
        return _sessions(rng, requests, rate)
    return _independent(rng, LENGTHS[name], requests, rate, burst)


def _independent(rng: Random, lengths: Lengths, requests: int, rate: float, burst: float) -> list[TraceRequest]:
    period = _BURST_SECONDS + _CALM_SECONDS
    calm = (period - burst * _BURST_SECONDS) / _CALM_SECONDS
    trace, now = [], 0.0
    for number in range(requests):
        while (
            True
        ):  # thinning: candidates come at the highest rate there is, and stay with the share of the present one
            now += rng.expovariate(rate * max(burst, calm))
            present = burst if now % period < _BURST_SECONDS else calm
            if rng.random() * max(burst, calm) < present:
                break
        prompt, output = lengths(rng)
        trace.append(TraceRequest(now, (Segment(number, prompt),), output))
    return trace


def _sessions(rng: Random, requests: int, rate: float) -> list[TraceRequest]:
    """Make conversations: each begins with one of four system prompts, and each turn repeats all before it."""
    texts = count(len(_SYSTEM_PROMPTS))
    mean_turns = sum(_TURNS) / 2
    trace: list[TraceRequest] = []
    begins = 0.0
    for session in count():
        if len(trace) >= requests and begins > trace[requests - 1].arrival:
            return trace[:requests]
        begins += rng.expovariate(rate / mean_turns)
        system = rng.randrange(len(_SYSTEM_PROMPTS))
        prompt = [Segment(system, _SYSTEM_PROMPTS[system])]
        now = begins
        for _ in range(rng.randint(*_TURNS)):
            prompt.append(Segment(next(texts), min(8000, max(50, round(1200 * rng.lognormvariate(0, 1.0))))))
            output = min(1500, max(16, round(200 * rng.lognormvariate(0, 0.7))))
            trace.append(TraceRequest(now, tuple(prompt), output, session))
            prompt.append(Segment(next(texts), output))
            now += rng.expovariate(1 / _THINKING) + 2.0
        trace.sort(key=lambda request: request.arrival)
    raise AssertionError  # count() never ends
