"""Make requests of uneven length, and record what clients measure. Pure."""

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
        """Count the tokens of the prompt as the stand-in does, at four bytes each; for English that is nearly right."""
        return len(self.prompt) // TOKEN_BYTES

    @property
    def tokens(self) -> int:
        """Count the tokens of prompt and output together."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one request. Times in seconds."""

    job: Job
    total: float
    first_token: float | None = None
    """Time to the first token; None without streaming."""
    per_token: float | None = None
    """Time per output token after the first; None without streaming, or with one token."""
    error: str | None = None
    """The reason of a failure."""


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
    """Return the median length in tokens, of prompt and output together."""
    return statistics.median(job.tokens for job in jobs)


def _prompt(rng: Random) -> str:
    least, most = _PROMPT_BYTES
    size = min(most, max(least, int(rng.lognormvariate(0, _SPREAD) * _MEDIAN_PROMPT_BYTES)))
    begin = rng.randrange(len(_TEXT))
    return (_TEXT * (size // len(_TEXT) + 2))[begin : begin + size]
