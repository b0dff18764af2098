"""Send requests through the real OpenAI client."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from dp_extproc.lab.demo.jobs import Job, Outcome


async def send(
    url: str, model: str, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
) -> list[Outcome]:
    """Send all jobs to a router, so many at a time. Nothing is retried, so that no failure is hidden.

    Args:
        url: URL of the router.
        model: The model in the requests.
        jobs: The requests to send.
        concurrency: Requests at a time.
        on_done: Called after each.
    """
    queue = iter(jobs)
    outcomes: list[Outcome] = []
    # Routers and engines are near: a proxy of the environment is for other destinations.
    http = DefaultAsyncHttpxClient(trust_env=False)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120, http_client=http)
    async with client:

        async def work() -> None:
            for job in queue:
                outcomes.append(await _outcome(client, model, job))
                on_done()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(jobs))):
                tasks.create_task(work())
    return outcomes


async def _outcome(client: AsyncOpenAI, model: str, job: Job) -> Outcome:
    began = time.perf_counter()
    try:
        return await (_stream(client, model, job) if job.stream else _ask(client, model, job))
    except Exception as error:  # noqa: BLE001 - whatever a router answers is an outcome; the client raises many kinds
        return Outcome(job, time.perf_counter() - began, error=f"{type(error).__name__}: {error}")


def _request(model: str, job: Job) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": job.prompt}], "max_tokens": job.max_tokens}


async def _ask(client: AsyncOpenAI, model: str, job: Job) -> Outcome:
    began = time.perf_counter()
    answer = await client.chat.completions.create(**_request(model, job))
    seconds = time.perf_counter() - began
    if not answer.choices or not answer.choices[0].message.content:
        return Outcome(job, seconds, error="an answer without a text")
    return Outcome(job, seconds)


async def _stream(client: AsyncOpenAI, model: str, job: Job) -> Outcome:
    began = time.perf_counter()
    arrivals = []
    finished = False
    async for chunk in await client.chat.completions.create(**_request(model, job), stream=True):
        if chunk.choices:
            if chunk.choices[0].delta.content:
                arrivals.append(time.perf_counter())
            finished = finished or chunk.choices[0].finish_reason is not None
    seconds = time.perf_counter() - began
    if not arrivals or not finished:
        return Outcome(job, seconds, error="a stream that ended early" if arrivals else "a stream without a token")
    per_token = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else None
    return Outcome(job, seconds, arrivals[0] - began, per_token)
