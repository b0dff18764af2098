"""Requests at a steady rate, whether or not the earlier ones were answered."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from e2e.load import SHORT, STREAM
from patience import wait_for

_STREAM_EVERY: Final = 4


@dataclass
class SteadyLoad:
    """What was sent, and how it ended. Each fourth request is a stream."""

    sent: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """Ends of the requests: ``ok``, or what is wrong."""
    over: bool = False

    @property
    def failed(self) -> dict[str, int]:
        return {end: count for end, count in self.ends.items() if end != "ok"}

    def goes_on(self, requests: int) -> None:
        """Wait until so many more requests have ended."""
        before = self.ends.total()
        wait_for(lambda: self.ends.total() >= before + requests, 60)


@contextmanager
def steady_load(url: str, rate: float = 30.0) -> Iterator[SteadyLoad]:
    """Send so many requests per second meanwhile. At the end wait until each has ended."""
    load = SteadyLoad()
    thread = threading.Thread(target=lambda: asyncio.run(_send(url, rate, load)), name="load")
    thread.start()
    try:
        yield load
    finally:
        load.over = True
        thread.join()


async def _send(url: str, rate: float, load: SteadyLoad) -> None:
    limits = httpx.Limits(max_connections=None)
    began = time.monotonic()
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client,
        asyncio.TaskGroup() as requests,
    ):
        while not load.over:
            requests.create_task(_request(client, STREAM if load.sent % _STREAM_EVERY == 0 else SHORT, load))
            load.sent += 1
            await asyncio.sleep(max(0.0, began + load.sent / rate - time.monotonic()))


async def _request(client: httpx.AsyncClient, body: dict[str, Any], load: SteadyLoad) -> None:
    try:
        answer = await client.post("/generate", json=body)
        whole = answer.text.rstrip().endswith("data: [DONE]") if body is STREAM else answer.text.startswith("{")
        end = "ok" if answer.status_code == 200 and whole else f"{answer.status_code} {answer.text[-200:]}"
    except httpx.HTTPError as error:
        end = f"{type(error).__name__}: {error}"
    load.ends[end] += 1
