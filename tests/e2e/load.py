"""Clients that send requests without pause while something else happens."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from patience import wait_for

SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 2}}
STREAM = {"text": "y", "sampling_params": {"max_new_tokens": 300}, "stream": True}
STREAMS = 20
SENDERS = 8
PATIENT = 40.0
"""Seconds; a process starts slowly on a busy machine."""


@dataclass
class Load:
    """Clients that send short requests one after the other, and some that read streams."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    """Results of the short requests: the status, and the text if it was no success."""
    ends: Counter[str] = field(default_factory=Counter)
    """The last lines of the streams."""
    over: bool = False

    async def send(self, client: httpx.AsyncClient) -> None:
        while not self.over:
            answer = await client.post("/generate", json=SHORT)
            self.statuses[answer.status_code if answer.is_success else f"{answer.status_code} {answer.text}"] += 1

    async def stream(self, client: httpx.AsyncClient, opened: asyncio.Semaphore) -> None:
        last = ""
        async with client.stream("POST", "/generate", json=STREAM) as answer:
            async for line in answer.aiter_lines():
                last = line or last
                opened.release()
        self.ends[last] += 1

    async def goes_on(self) -> None:
        """Wait until each sender can have had another response."""
        before = self.statuses.total()
        await asyncio.to_thread(wait_for, lambda: self.statuses.total() >= before + SENDERS, PATIENT)


def under_load(url: str, happen: Callable[[], None]) -> Load:
    """Let clients send short requests, and keep streams open, while something else happens."""

    async def story() -> Load:
        load, opened = Load(), asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(STREAMS):
                clients.create_task(load.stream(client, opened))
            for _ in range(STREAMS):
                await opened.acquire()
            for _ in range(SENDERS):
                clients.create_task(load.send(client))
            await load.goes_on()
            try:
                await asyncio.to_thread(happen)
                await load.goes_on()
            finally:
                load.over = True
        return load

    return asyncio.run(story())
