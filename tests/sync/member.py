"""Run a replica with synthetic attempts: in this process, or as a child that reads commands from stdin."""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path

from dp_extproc.config import SyncSettings
from dp_extproc.sync.messages import AnyNotice
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.transport.replica import join
from sync.peer_requests import PeerRequests, record_to

PATIENCE = 20.0
"""Seconds that a test waits for a condition."""


class Member:
    """Connect one replica to recorded requests."""

    def __init__(self, url: str, name: str, peer_timeout: float = 2.0) -> None:
        self.name = name
        self.requests = PeerRequests()
        self.outbox = Outbox(name)
        settings = SyncSettings.model_validate({"url": url, "peer_timeout": f"{peer_timeout}s"})
        self.notices: list[AnyNotice] = []
        self.replica = join(settings, self.outbox, self.requests.open_peer, heed=self._heed, clock=time.monotonic)
        self.own: list[int] = []
        """Open attempts; the record of an attempt has its number as rank."""
        self._numbers = count(random.randrange(1 << 40))

    def _heed(self, notice: AnyNotice, _at: float) -> None:
        self.notices.append(notice)

    def open(self, attempts: int = 1) -> None:
        """Begin some attempts."""
        for _ in range(attempts):
            number = next(self._numbers)
            self.outbox.opened(number, record_to(number), time.monotonic())
            self.own.append(number)

    def end(self, attempts: int = 1) -> None:
        """End the oldest attempts."""
        for number in self.own[:attempts]:
            self.outbox.prefill_answered(number, time.monotonic())
            self.outbox.first_token(number, time.monotonic())
            self.outbox.ended(number, time.monotonic())
        del self.own[:attempts]

    async def work(self) -> None:
        """Begin and end attempts until cancelled, a few hundred per second."""
        while True:
            self.open(3)
            self.end(3 if len(self.own) > 100 else 2)
            await asyncio.sleep(0.01)

    def follows(self, *others: "Member") -> bool:
        """Check that the recorded requests are exactly the open attempts of other members."""
        return self.requests.open_ranks == sorted(number for other in others for number in other.own)


@asynccontextmanager
async def running(*members: Member) -> AsyncIterator[None]:
    """Run replicas."""
    async with AsyncExitStack() as stack:
        for member in members:
            await stack.enter_async_context(in_background(member.replica.run()))
        yield


@asynccontextmanager
async def in_background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run something until the end of the block. If it fails, so does the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        await asyncio.sleep(0.01)


async def obey(member: Member) -> None:
    """Run the commands of stdin, and answer each with the state."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        command, number = line.split()
        {b"open": member.open, b"end": member.end, b"state": lambda _: None}[command](int(number))
        status = member.replica.status()
        state = {"own": member.own, "followed": member.requests.open_ranks, "connected": status.connected}
        sys.stdout.write(json.dumps(state) + "\n")
        sys.stdout.flush()


async def main(url: str, name: str) -> None:
    """Run as a process."""
    member = Member(url, name)
    async with running(member):
        await obey(member)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    asyncio.run(main(*sys.argv[1:]))
