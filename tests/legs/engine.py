"""An engine on a real socket whose connections follow scripts, and a client that sends legs to it."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self

import uvloop

from dp_extproc.attempt.events import LegBody, LegClosed, LegEvent, LegHeaders, LegOpened, ToLeg
from dp_extproc.legs.client import LegClient, SentLeg
from dp_extproc.legs.listener import LegOutcome, ResendCause
from dp_extproc.legs.request import LegRequest

OK: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
PREAMBLE: Final = b'{"rid":"r",'
TAIL: Final = b'"text":"a"}'
PATIENCE: Final = 20.0
"""Seconds after which a story has hung."""
_LENGTH: Final = re.compile(rb"^content-length: (\d+)\r$", re.IGNORECASE | re.MULTILINE)


class Connection:
    """One accepted connection, as a script sees it."""

    def __init__(self, engine: "Engine", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        """Receive the head of a request."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> bytes:
        """Receive a whole request, and note it; give its body."""
        head = await self.head()
        (length,) = _LENGTH.findall(head)
        body = await self.reader.readexactly(int(length))
        self._engine.requests.append((head, body))
        return body

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, answer: bytes = OK) -> None:
        """Receive a request, and answer it."""
        await self.request()
        await self.say(answer)

    def reset(self) -> None:
        """Close the connection by a reset."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.close()

    async def left(self) -> None:
        """Wait until the client has closed the connection."""
        with suppress(ConnectionError):
            while await self.reader.read(1 << 20):
                pass


Script = Callable[[Connection], Awaitable[object]]


async def serve_forever(connection: Connection) -> None:
    """Answer every request of a connection."""
    while True:
        await connection.answer()


class Engine:
    """Serves each connection by the next of its scripts, and those behind the last like the last."""

    def __init__(self, *scripts: Script, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
        self._scripts = scripts or (serve_forever,)
        self._host, self._port, self._options = host, port, options
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.ended: list[asyncio.Event] = []
        """By connection: whether its script has ended, or its client has closed it."""
        self.failures: list[Exception] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, self._port, **self._options)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert self.failures == []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        ended = asyncio.Event()
        self.ended.append(ended)
        try:
            await script(Connection(self, reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:  # noqa: BLE001 - shown by the end of the test
            self.failures.append(error)
        finally:
            ended.set()
            self._tasks.discard(task)
            writer.close()


class Counts:
    """Counts what a client reports of its legs."""

    def __init__(self) -> None:
        self.sent = 0
        self.resent: list[ResendCause] = []
        self.outcomes: list[LegOutcome] = []

    def leg_sent(self) -> None:
        self.sent += 1

    def leg_resent(self, cause: ResendCause) -> None:
        self.resent.append(cause)

    def leg_ended(self, outcome: LegOutcome, seconds: float) -> None:
        assert seconds >= 0
        self.outcomes.append(outcome)


class Sender:
    """A client, and the events of all of its legs."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.client = LegClient(self.counts)
        self.events: list[LegEvent] = []
        self.wants: ToLeg = ToLeg.PROCEED
        """What is asked for when response headers come."""

    def request(self, address: str, **options: Any) -> LegRequest:
        """Make a request with a small body."""
        given = {"preamble": PREAMBLE, "tail": memoryview(TAIL), "timeout": 10.0, "path": "/generate", "headers": ()}
        return LegRequest(address=address, **{**given, **options})

    def start(self, address: str, **options: Any) -> SentLeg:
        """Send a leg without waiting for it."""

        def take(event: LegEvent) -> None:
            self.events.append(event)
            if isinstance(event, LegHeaders):
                leg.carry_out(self.wants)

        leg = self.client.send(self.request(address, **options), take)
        return leg

    async def send(self, address: str, **options: Any) -> list[LegEvent]:
        """Send a leg to its end; give its events but the opening and, if it has no problem, the end."""
        self.events.clear()
        await self.start(address, **options).closed()
        await asyncio.sleep(0)  # its end is reported by then
        first, *rest = self.events
        assert first == LegOpened()
        assert isinstance(rest[-1], LegClosed)
        return rest if rest[-1].problem else rest[:-1]

    def body(self) -> bytes:
        """Join the bodies that were reported."""
        return b"".join(event.data for event in self.events if isinstance(event, LegBody))

    @property
    def problem(self) -> str:
        closed = self.events[-1]
        assert isinstance(closed, LegClosed)
        return closed.problem


@asynccontextmanager
async def sender() -> AsyncIterator[Sender]:
    """Run a client. At the end no leg may be in flight."""
    made = Sender()
    try:
        yield made
        assert len(made.client) == 0
    finally:
        await made.client.close()


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    while not holds():  # noqa: ASYNC110 - it is a condition of any kind
        await asyncio.sleep(0.001)


def play(story: Awaitable[None]) -> None:
    """Run a story on the event loop of the service."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await story

    uvloop.run(bounded())
