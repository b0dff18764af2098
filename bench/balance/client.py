"""Send a trace and measure what clients see, at little cost: bodies are made before, and streams are not parsed."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec
import uvloop

from bench.balance.engines import MODEL
from dp_extproc.lab.simulate.outcome import Outcome
from dp_extproc.lab.workload.texts import chat_messages
from dp_extproc.lab.workload.trace import TraceRequest

_TAIL: Final = 1024
"""Bytes kept of a stream's end, where the usage is."""
_COMPLETION: Final = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send."""

    number: int
    due: float
    """Seconds since the start."""
    body: bytes
    output_tokens: int
    tokens: int
    """Tokens of prompt and output."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The result of a request without a correct response."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """The way a trace is sent."""

    time_scale: float = 1.0
    """Time scale of the engines; arrivals are scaled with it, and measured times are divided by it."""
    concurrency: int | None = None
    """Number of requests at a time, without regard to arrivals."""
    timeout: float = 120.0
    """Timeout of one request, in seconds."""


def make_jobs(trace: Sequence[TraceRequest]) -> list[Job]:
    """Write the bodies."""
    return [
        Job(
            number,
            request.arrival,
            _body(request),
            request.output_tokens,
            request.prompt_tokens + request.output_tokens,
        )
        for number, request in enumerate(trace)
    ]


def send(url: str, jobs: Sequence[Job], load: Load, on_done: Callable[[], None]) -> tuple[list[Outcome], list[Failed]]:
    """Send all jobs, without retries, so that no failure is hidden.

    Args:
        url: Address of the router.
        jobs: The jobs in the order of their arrival.
        load: The way to send them.
        on_done: Called after each.

    Returns:
        The answered requests, with times in seconds of an unscaled engine, and the failed ones.
    """
    results = uvloop.run(_send(f"{url}/v1/chat/completions", jobs, load, on_done))
    return (
        [result for result in results if isinstance(result, Outcome)],
        [result for result in results if isinstance(result, Failed)],
    )


def _body(request: TraceRequest) -> bytes:
    return msgspec.json.encode(
        {
            "model": MODEL,
            "messages": chat_messages(request),
            "max_tokens": request.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def _send(url: str, jobs: Sequence[Job], load: Load, on_done: Callable[[], None]) -> list[Outcome | Failed]:
    timeout = aiohttp.ClientTimeout(total=load.timeout * load.time_scale)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        results: list[Outcome | Failed] = []
        start = time.perf_counter()

        async def one(job: Job) -> None:
            results.append(await _ask(session, url, job, load.time_scale))
            on_done()

        async def work(waiting: Iterator[Job]) -> None:
            for job in waiting:
                await one(job)

        async with asyncio.TaskGroup() as tasks:
            if load.concurrency is not None:
                waiting = iter(jobs)
                for _ in range(load.concurrency):
                    tasks.create_task(work(waiting))
            else:
                for job in jobs:
                    await asyncio.sleep(job.due * load.time_scale - (time.perf_counter() - start))
                    tasks.create_task(one(job))
    return results


async def _ask(session: aiohttp.ClientSession, url: str, job: Job, time_scale: float) -> Outcome | Failed:
    began = time.perf_counter()
    first = last = None
    tail = b""
    try:
        async with session.post(url, data=job.body, headers={"content-type": "application/json"}) as answer:
            if answer.status != 200:
                return Failed(job.number, f"{answer.status} {(await answer.text())[:200]}")
            async for piece in answer.content.iter_any():
                if first is None and b"data:" in piece:
                    first = time.perf_counter()
                tail = (tail + piece)[-_TAIL:]
            last = time.perf_counter()
    except (aiohttp.ClientError, TimeoutError) as error:
        return Failed(job.number, f"{type(error).__name__} {error}"[:200])
    usages = _COMPLETION.findall(tail)
    if first is None or not usages or int(usages[-1]) != job.output_tokens:
        return Failed(job.number, f"cut off: {tail[-200:].decode(errors='replace')}")
    per_token = (last - first) / (job.output_tokens - 1) / time_scale if job.output_tokens > 1 else None
    return Outcome(job.number, (first - began) / time_scale, per_token, (last - began) / time_scale, job.tokens)
