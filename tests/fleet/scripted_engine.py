"""An HTTP server on a real socket. Its pages, and its misbehaviour, are data of a test."""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self

from dp_extproc.engines.model import in_url

Misbehaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Answer = bytes | int | Misbehaviour
"""A page, a status without one, or a function that gets the connection after the request has been read."""


_LENGTH: Final = re.compile(r"^content-length: (\d+)", re.IGNORECASE | re.MULTILINE)


class ScriptedEngine:
    """Answers with ``pages``, and with 404 on other paths. An async context manager."""

    def __init__(self, pages: dict[str, Answer] | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.pages = pages or {}
        self.host = host
        self.port = port
        self.requests: list[str] = []
        self.host_headers: set[str] = set()
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://{in_url(self.host)}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        # A client that goes away, and a stop in the middle of an answer, are what such tests are about.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ")[1]
                await reader.readexactly(int(next(iter(_LENGTH.findall(head)), "0")))
                self.requests.append(path)
                self.host_headers |= {
                    line.partition(":")[2].strip() for line in head.splitlines() if line.lower().startswith("host:")
                }
                answer = self.pages.get(path, 404)
                if callable(answer):
                    await answer(reader, writer)
                    break
                writer.write(_response(answer))
                await writer.drain()
        self._writers.discard(writer)
        writer.close()


def _response(answer: bytes | int) -> bytes:
    status, body = (200, answer) if isinstance(answer, bytes) else (answer, b"{}")
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never answer, until the client closes the connection."""
    await reader.read()


def refuse(text: bytes) -> Misbehaviour:
    """Answer 400 with a text."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
        await writer.drain()

    return answer


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Cut the connection without an answer."""
    writer.transport.abort()


async def not_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer in another protocol."""
    writer.write(b"220 smtp ready\r\n")
    await writer.drain()


async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Announce more bytes than are sent."""
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"loads"')
    await writer.drain()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send one byte at a time without end: no single read takes long."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\n \r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send without end, as fast as the client reads."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n%b\r\n" % (b" " * 0x10000))
        await writer.drain()
