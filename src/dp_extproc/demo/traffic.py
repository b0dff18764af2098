"""Requests of uneven length through the real OpenAI client, and what their senders saw."""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from openai import AsyncOpenAI, OpenAIError

MODEL: Final = "demo"

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one. Times in seconds."""

    total: float
    first_token: float | None
    """Time to the first token; None without streaming."""
    per_token: float | None
    """Time per output token behind the first; None without streaming, or with one token."""
    error: str | None = None
    """Why it failed."""


def make_jobs(count: int, seed: int) -> list[Job]:
    """Make the same jobs for the same seed. Every other one streams."""
    rng = random.Random(seed)
    return [
        Job(
            prompt=_prompt(rng),
            max_tokens=rng.randint(*_OUTPUT_TOKENS),
            stream=number % 2 == 0,
        )
        for number in range(count)
    ]


def _prompt(rng: random.Random) -> str:
    least, most = _PROMPT_BYTES
    size = min(most, max(least, int(rng.lognormvariate(0, _SPREAD) * _MEDIAN_PROMPT_BYTES)))
    begin = rng.randrange(len(_TEXT))
    return (_TEXT * (size // len(_TEXT) + 2))[begin : begin + size]


async def send(url: str, jobs: list[Job], concurrency: int, on_done: Callable[[], None]) -> list[Outcome]:
    """Send all jobs to Envoy, so many at a time. Nothing is retried, so that nothing is hidden."""
    queue = iter(jobs)
    outcomes: list[Outcome] = []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def work() -> None:
            for job in queue:
                began = time.perf_counter()
                try:
                    outcomes.append(await (_stream(client, job) if job.stream else _ask(client, job)))
                except OpenAIError as error:
                    outcomes.append(Outcome(time.perf_counter() - began, None, None, str(error)))
                on_done()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(work())
    return outcomes


async def _ask(client: AsyncOpenAI, job: Job) -> Outcome:
    began = time.perf_counter()
    await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": job.prompt}], max_tokens=job.max_tokens
    )
    return Outcome(time.perf_counter() - began, None, None)


async def _stream(client: AsyncOpenAI, job: Job) -> Outcome:
    began = time.perf_counter()
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": job.prompt}], max_tokens=job.max_tokens, stream=True
    )
    arrivals = [time.perf_counter() async for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    ended = time.perf_counter()
    if not arrivals:
        return Outcome(ended - began, None, None)
    per_token = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else None
    return Outcome(ended - began, arrivals[0] - began, per_token)
