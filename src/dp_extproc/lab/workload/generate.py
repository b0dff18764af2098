"""Make traces; the same seed makes the same trace."""

from itertools import count, islice
from random import Random
from typing import Final

from dp_extproc.lab.workload.arrivals import arrivals
from dp_extproc.lab.workload.lengths import LENGTHS, azure, conversation_output, conversation_text
from dp_extproc.lab.workload.trace import Language, Segment, TraceRequest

SESSIONS: Final = "sessions"

_CHINESE: Final = {"chinese": 1.0, "mixed": 0.5}
"""Share of the requests that are in Chinese, by the kind of traffic; they are those of ``azure``, number by number."""
NAMES: Final = (*LENGTHS, *_CHINESE, SESSIONS)

_TURNS: Final = (3, 10)
_THINKING: Final = 12.0
"""Mean seconds between two turns of a conversation, beside the two seconds that are always there."""
_SYSTEM_PROMPTS: Final = (800, 2000, 4000, 6000)


def make_trace(name: str, requests: int, rate: float, seed: int, *, burst: float = 1.0) -> list[TraceRequest]:
    """Make a trace.

    Args:
        name: One of ``NAMES``.
        requests: Number of requests.
        rate: Arrivals per second, on average.
        seed: Equal seeds make equal traces.
        burst: For 5 of every 20 seconds so many times the rate, and less in between; 1 is a Poisson process.
    """
    base = azure.__name__ if name in _CHINESE else name
    rng = Random(f"{base} {seed}")
    if name == SESSIONS:
        return _sessions(rng, requests, rate)
    tongues = Random(f"{name} {seed} languages")
    trace = []
    for number, now in enumerate(islice(arrivals(rng, rate, burst), requests)):
        prompt, output = LENGTHS[base](rng)
        language = Language.CHINESE if tongues.random() < _CHINESE.get(name, 0.0) else Language.ENGLISH
        trace.append(TraceRequest(now, (Segment(number, prompt),), output, language=language))
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
            prompt.append(Segment(next(texts), conversation_text(rng)))
            output = conversation_output(rng)
            trace.append(TraceRequest(now, tuple(prompt), output, session))
            prompt.append(Segment(next(texts), output))
            now += rng.expovariate(1 / _THINKING) + 2.0
        trace.sort(key=lambda request: request.arrival)
    raise AssertionError  # count() never ends
