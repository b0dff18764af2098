"""Requests of uneven length, and what their senders saw. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES

_TEXT: Final = "the of and to in is that it was for on are with as his they at be this from have or by one "
_MEDIAN_PROMPT_BYTES: Final = 5000
_SPREAD: Final = 1.0
"""Sigma of the logarithm: every tenth prompt is more than three and a half times as long as the median."""
_PROMPT_BYTES: Final = (40, 24_000)
_OUTPUT_TOKENS: Final = (16, 100)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send."""

    prompt: str
    max_tokens: int
    stream: bool

    @property
    def prompt_tokens(self) -> int:
        """Of the stand-in engine, which counts four bytes each. Other tokenizers come near to that with English."""
        return len(self.prompt) // TOKEN_BYTES

    @property
    def tokens(self) -> int:
        """Of prompt and output together."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one. Times in seconds."""

    job: Job
    total: float
    first_token: float | None = None
    """Time to the first token; None without streaming."""
    per_token: float | None = None
    """Time per output token behind the first; None without streaming, or with one token."""
    error: str | None = None
    """Why it failed."""


def make_jobs(count: int, seed: int) -> list[Job]:
    """Make the same jobs for the same seed. Every other one streams."""
    rng = Random(seed)
    return [
        Job(
            prompt=_prompt(rng),
            max_tokens=rng.randint(*_OUTPUT_TOKENS),
            stream=number % 2 == 0,
        )
        for number in range(count)
    ]


def middle_length(jobs: Sequence[Job]) -> float:
    """Give the length in tokens, of prompt and output together, that as many jobs exceed as stay below it."""
    return statistics.median(job.tokens for job in jobs)


def _prompt(rng: Random) -> str:
    least, most = _PROMPT_BYTES
    size = min(most, max(least, int(rng.lognormvariate(0, _SPREAD) * _MEDIAN_PROMPT_BYTES)))
    begin = rng.randrange(len(_TEXT))
    return (_TEXT * (size // len(_TEXT) + 2))[begin : begin + size]
