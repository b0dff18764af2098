"""Workers that die, are restarted one by one, or stop, while Envoy has requests and streams for them."""

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import pytest

from e2e.stack import PATIENCE, Stack, run_stack, wait_for

SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 2}}
STREAM = {"text": "y", "sampling_params": {"max_new_tokens": 300}, "stream": True}
STREAMS = 20
SENDERS = 8
PATIENT = 40.0
"""Seconds; a worker takes its time to start on a busy machine."""


@pytest.fixture
def workers() -> Iterator[Stack]:
    """A fleet behind two workers; decode takes some seconds for a stream."""
    options = ("--time-scale", "1", *PATIENCE)
    with run_stack(options=options, listen={"workers": 2}, drain="1500ms") as stack:
        wait_for(lambda: all(each["ready"] for each in of(stack)), PATIENT)
        yield stack
        stack.service.wait_until_idle()


def of(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.service.loads()["workers"]
    return found


@dataclass
class Load:
    """Clients that send short requests one after the other, and some that read streams."""

    statuses: Counter[int | str] = field(default_factory=Counter)
    """What the short requests got; with its text what was not a success."""
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
        """Wait until each of the senders can have had another answer."""
        before = self.statuses.total()
        await asyncio.to_thread(wait_for, lambda: self.statuses.total() >= before + SENDERS, PATIENT)


def under_load(stack: Stack, trouble: Callable[[], None]) -> Load:
    """Have clients send short requests, and streams be open, while something happens."""

    async def story() -> Load:
        load, opened = Load(), asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=stack.envoy.url, timeout=60, trust_env=False, limits=limits) as client,
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
                await asyncio.to_thread(trouble)
                await load.goes_on()
            finally:
                load.over = True
        return load

    return asyncio.run(story())


def per_worker(stack: Stack, metric: str, role: str) -> dict[str, float]:
    """Add up a metric of the ranks of a role, worker by worker."""
    found: dict[str, float] = {"0": 0.0, "1": 0.0}
    line = re.compile(rf'^{metric}{{worker="(\d)",.*role="{role}".*}} (.*)$', re.MULTILINE)
    for worker, value in line.findall(stack.service.metrics()):
        found[worker] += float(value)
    return found


def test_load_is_counted_once_whichever_worker_places_it(workers: Stack) -> None:
    """Envoy takes the workers in turn; each knows of all requests, and places the next one by all of them."""

    async def story() -> None:
        async with (
            httpx.AsyncClient(base_url=workers.envoy.url, timeout=60, trust_env=False) as client,
            asyncio.TaskGroup() as clients,
        ):
            for count in range(1, 5):
                clients.create_task(client.post("/generate", json=STREAM))
                await asyncio.to_thread(wait_for, partial(both_know_of, count))

    def both_know_of(count: int) -> bool:
        return per_worker(workers, "dp_extproc_reserved_requests", "decode") == {"0": count, "1": count}

    asyncio.run(story())

    assert per_worker(workers, "dp_extproc_picks_total", "decode") == {"0": 2, "1": 2}
    assert sorted(request["rank"] for request in workers.decodes[0].requests()) == [0, 0, 1, 1]


def is_back(stack: Stack, index: int, pid: int) -> bool:
    worker = of(stack)[index]
    return bool(worker["ready"] and worker["pid"] != pid)


def test_a_worker_that_is_killed_costs_no_request(workers: Stack) -> None:
    """SIGKILL under load: the other worker takes what comes, open streams go on, and the lost one comes back."""
    victim = of(workers)[0]["pid"]

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: is_back(workers, 0, victim), PATIENT)

    load = under_load(workers, kill)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
    assert [each["restarts"] for each in of(workers)] == [1, 0]


def test_workers_that_are_restarted_one_by_one_cost_no_request(workers: Stack) -> None:
    """SIGTERM to each in turn under load: each drains and comes back, and nobody notices."""

    def restart() -> None:
        for index in range(2):
            pid = of(workers)[index]["pid"]
            os.kill(pid, signal.SIGTERM)
            wait_for(partial(is_back, workers, index, pid), PATIENT)

    load = under_load(workers, restart)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
    assert workers.service.log().count("has ended with status 0; starting it again") == 2
