"""Streams and new requests have defined results when the service stops or dies."""

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest

from e2e.stack import PATIENCE, Stack, run_stack
from patience import wait_for

SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
STREAM = {"text": "y", "sampling_params": {"max_new_tokens": 60}, "stream": True}
COMPLETE = 60 + 1
"""The events of a complete stream: one for each token, and the last."""


@pytest.fixture
def slow() -> Iterator[Stack]:
    """Give a fleet whose streams take some seconds."""
    with run_stack(options=("--time-scale", "5", *PATIENCE), drain="20s") as stack:
        yield stack
        stack.service.send_signal(signal.SIGTERM)  # the second signal, at the end, cuts the drain short


def while_streaming(stack: Stack, count: int, happen: Callable[[], Awaitable[None]]) -> Counter[tuple[int, str]]:
    """Open streams, call *happen* once each has had an event, and read them to their ends.

    Returns:
        How many streams had so many events, with this as the last one.
    """

    async def read(client: httpx.AsyncClient, opened: asyncio.Semaphore) -> tuple[int, str]:
        async with client.stream("POST", "/generate", json=STREAM) as answer:
            events = 0
            last = ""
            async for line in answer.aiter_lines():
                if line:
                    if not events:
                        opened.release()
                    last = line
                    events += 1
        return events, last

    async def story() -> Counter[tuple[int, str]]:
        opened = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=stack.envoy.url, timeout=60, trust_env=False, limits=limits) as client,
            asyncio.TaskGroup() as clients,
        ):
            readers = [clients.create_task(read(client, opened)) for _ in range(count)]
            for _ in range(count):
                await opened.acquire()
            assert not any(reader.done() for reader in readers)
            await happen()
        return Counter(reader.result() for reader in readers)

    return asyncio.run(story())


def test_streams_continue_while_the_service_drains_and_after_it_ends(slow: Stack) -> None:
    """After SIGTERM the service is not ready, still answers, and ends with status 0; no stream is affected."""
    answered: list[int] = []

    async def stop() -> None:
        slow.service.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_for, lambda: "stopping: not ready" in slow.service.log())
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            answered.append((await client.get(f"{slow.service.admin_url}/readyz")).status_code)
            answered.append((await client.get(f"{slow.envoy.url}/v1/models")).status_code)
        assert await asyncio.to_thread(slow.service.stop) == 0  # a second signal cuts the drain short

    ends = while_streaming(slow, 20, stop)

    assert ends == {(COMPLETE, "data: [DONE]"): 20}
    assert answered == [503, 200]


def test_streams_in_full_duplex_continue_after_the_service_ends() -> None:
    """Envoy breaks a response if its ext_proc stream breaks, so the service ends these streams with status OK."""
    options = ("--time-scale", "5", *PATIENCE)
    with run_stack(options=options, drain="10ms", envoy={"body_mode": "full_duplex_streamed"}) as stack:

        async def stop() -> None:
            assert await asyncio.to_thread(stack.service.stop) == 0

        ends = while_streaming(stack, 20, stop)

    assert ends == {(COMPLETE, "data: [DONE]"): 20}


def test_streams_continue_when_the_service_is_killed(slow: Stack) -> None:
    """After SIGKILL 200 streams complete; new requests get a 503, and are served again soon after the restart."""
    refused: list[httpx.Response] = []

    async def kill() -> None:
        slow.service.stop(signal.SIGKILL)
        async with httpx.AsyncClient(base_url=slow.envoy.url, timeout=30, trust_env=False) as client:
            refused.append(await client.post("/generate", json=SHORT))

    ends = while_streaming(slow, 200, kill)
    slow.service.start()
    slow.service.wait_until_listening()
    slow.service.wait_until_ready()

    assert ends == {(COMPLETE, "data: [DONE]"): 200}
    assert refused[0].status_code == 503
    assert refused[0].json()["error"]["code"] == "service_unavailable"
    wait_for(lambda: slow.client.post("/generate", json=SHORT).status_code == 200, 1.0)
