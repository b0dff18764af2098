"""Requests at a steady rate through Envoy while engines come and go, and checks that no engine is picked after it left.

Use it as :mod:`e2e.test_file_discovery` does::

    departures = Departures()
    with steady_load(envoy.url) as load:
        ...                             # change what a source reports
        departures.left(engine)         # at the moment of the change
        load.go_on()
        departures.returned(engine)     # before it is listed again
    load.check()
    departures.check()                  # while the engines that left still run, or call keep() before they are stopped
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from e2e.stack import Remembers
from patience import wait_for

RATE = 30.0
"""Requests per second."""
LATE = 1.0
"""Seconds after which an engine that left must not be picked any more."""
PATIENT = 60.0
WHOLE = {"text": "x", "sampling_params": {"max_new_tokens": 4}}
STREAM = {"text": "y", "sampling_params": {"max_new_tokens": 40}, "stream": True}
STREAMS_EVERY = 3
"""Every third request is a stream."""
DONE = "data: [DONE]"


@dataclass
class SteadyLoad:
    """The requests so far."""

    sent: int = 0
    results: Counter[str] = field(default_factory=Counter)
    """Number of ended requests by result: ``ok``, or what went wrong."""
    is_over: bool = False

    async def run(self, url: str, rate: float) -> None:
        """Send at the rate, however long the answers take, until it is over; then wait for the last answers."""
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=url, timeout=PATIENT, trust_env=False, limits=limits) as client,
            asyncio.TaskGroup() as requests,
        ):
            began = asyncio.get_running_loop().time()
            for number in count():
                if self.is_over:
                    break
                self.sent += 1
                requests.create_task(self._send(client, is_stream=number % STREAMS_EVERY == 0))
                await asyncio.sleep(began + (number + 1) / rate - asyncio.get_running_loop().time())

    async def _send(self, client: httpx.AsyncClient, *, is_stream: bool) -> None:
        try:
            answer = await client.post("/generate", json=STREAM if is_stream else WHOLE)
        except httpx.HTTPError as error:
            self.results[repr(error)] += 1
            return
        if not answer.is_success:
            self.results[f"{answer.status_code} {answer.text}"] += 1
        elif is_stream and not answer.text.rstrip().endswith(DONE):
            self.results["a stream was cut"] += 1
        else:
            self.results["ok"] += 1

    def go_on(self, seconds: float = 0.0) -> None:
        """Wait for so many seconds, and until twenty further requests have ended."""
        before, until = self.results.total(), time.monotonic() + seconds
        wait_for(lambda: time.monotonic() >= until and self.results.total() >= before + 20, PATIENT + seconds)

    def check(self) -> None:
        """Check that no request failed."""
        assert self.results.total() == self.sent
        assert self.results.keys() == {"ok"}, self.results


@contextmanager
def steady_load(url: str, rate: float = RATE) -> Iterator[SteadyLoad]:
    """Send requests from a thread as long as the block lasts."""
    load = SteadyLoad()
    thread = threading.Thread(target=asyncio.run, args=(load.run(url, rate),), name="load")
    thread.start()
    try:
        wait_for(lambda: load.results.total() >= 10, PATIENT)
        yield load
    finally:
        load.is_over = True
        thread.join()


@dataclass
class Departures:
    """When engines left, and what they received after that."""

    _left: list[tuple[Remembers, float]] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    """Requests that an engine received more than a second after it left."""
    count: int = 0

    def left(self, *engines: Remembers) -> None:
        """Note that engines leave now."""
        self._left += [(engine, time.time()) for engine in engines]
        self.count += len(engines)

    def returned(self, *engines: Remembers) -> None:
        """Note that engines are about to be listed again."""
        self.keep(engines)

    def keep(self, engines: Sequence[Remembers]) -> None:
        """Collect what engines have received late, before they return or are stopped."""
        for engine, moment in self._left:
            if engine in engines:
                self.late += [each for each in engine.requests() if each["received_at"] > moment + LATE]
        self._left = [(engine, moment) for engine, moment in self._left if engine not in engines]

    def check(self) -> None:
        """Check that no engine received a request more than a second after it left."""
        self.keep([engine for engine, _ in self._left])
        assert self.late == []
