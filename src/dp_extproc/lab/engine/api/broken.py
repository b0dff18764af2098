"""Answer late, never, partly, or with bytes that are not HTTP."""

import asyncio
import math
import zlib
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_extproc.lab.engine.connection import connection_of

_NOISE: Final = b"\x16\x03\x01\x00\xa5 not HTTP \xff\xfe\r\n\r\n"
"""A TLS alert, as from a server that speaks TLS on a plain port."""
_MISSING: Final = 1000
"""Bytes that a short body lacks."""
_PIECE: Final = 1 << 16
"""Bytes of a flood that are sent at once, at least; as many as uvicorn writes before it waits for the client."""


async def pause(receive: Receive, released: asyncio.Event, seconds: float | None = None) -> bool:
    """Wait for so long, or until the fault is switched off.

    Returns:
        Whether the client is still there.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    either = {gone, asyncio.ensure_future(released.wait())}
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return not gone.done()
    finally:
        for each in either:
            each.cancel()


async def noise(scope: Scope, _receive: Receive, _send: Send) -> None:
    """Answer with bytes that are not HTTP."""
    connection_of(scope).write_and_close(_NOISE)


class Pause:
    """Wait some seconds without an answer."""

    def __init__(self, released: asyncio.Event, seconds: float) -> None:
        self._released = released
        self._seconds = seconds

    async def __call__(self, _scope: Scope, receive: Receive, _send: Send) -> None:
        if self._seconds:
            await pause(receive, self._released, self._seconds)

    @property
    def is_cut_short(self) -> bool:
        """Whether the fault was switched off."""
        return self._released.is_set()


class Cut:
    """Close a connection: with a RST, or with a FIN after all that was written."""

    def __init__(self, before: Pause, *, reset: bool) -> None:
        self._before = before
        self._reset = reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._before(scope, receive, send)
        connection = connection_of(scope)
        if self._reset:
            connection.reset()
        else:
            connection.write_and_close()


class Hang:
    """Answer nothing as long as the client waits."""

    def __init__(self, released: asyncio.Event) -> None:
        self._released = released

    async def __call__(self, scope: Scope, receive: Receive, _send: Send) -> None:
        """Wait; the connection is closed when the fault is switched off."""
        if await pause(receive, self._released):
            connection_of(scope).write_and_close()


class Short:
    """Answer with fewer bytes than the declared length."""

    def __init__(self, healthy: ASGIApp, before: Pause) -> None:
        self._healthy = healthy
        self._before = before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer without the last bytes."""

        async def shorten(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send({**message, "headers": [*map(_lengthen, message["headers"]), *_length_of_stream(message)]})
                return
            await send({**message, "more_body": True})
            if not message.get("more_body"):
                await self._before(scope, receive, send)
                connection_of(scope).write_and_close()

        await self._healthy(scope, receive, shorten)


class Long:
    """Answer with bytes after the end."""

    def __init__(self, healthy: ASGIApp) -> None:
        self._healthy = healthy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and write more bytes."""

        async def lengthen(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                connection_of(scope).write_and_close(_NOISE)

        await self._healthy(scope, receive, lengthen)


class Interrupted:
    """Begin an answer well; then apply a fault."""

    def __init__(self, healthy: ASGIApp, after: int, fault: ASGIApp) -> None:
        """Prepare.

        Args:
            healthy: The answer.
            after: Chunks of it that the client gets. If it has no more than these, half of the last one is kept back.
            fault: What happens then. If it returns, the answer goes on.
        """
        self._healthy = healthy
        self._left = after
        self._fault = fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer up to the fault."""

        async def interrupt(message: Message) -> None:
            if message["type"] != "http.response.body" or self._left < 0:
                await send(message)
                return
            last = not message.get("more_body")
            body = message.get("body", b"")
            if self._left and not last:
                self._left -= 1
                await send(message)
                return
            half = len(body) // 2 if self._left else 0
            self._left = -1
            if half:
                await send({"type": "http.response.body", "body": body[:half], "more_body": True})
            await self._fault(scope, receive, send)
            await send({**message, "body": body[half:]})

        await self._healthy(scope, receive, interrupt)


class Flooded:
    """Stream many other bytes before the first event."""

    def __init__(self, healthy: ASGIApp, text: bytes, size: int, before: Pause) -> None:
        """Prepare.

        Args:
            healthy: The answer; one that is no stream is given as it is.
            text: To be repeated.
            size: Bytes of it before the answer goes on; 0 for as long as the client reads and the fault is not
                switched off.
            before: What comes between the head and the flood.
        """
        self._healthy = healthy
        self._text = text
        self._size = size
        self._before = before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the flood behind the head."""

        async def flood(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and _is_stream(message):
                await self._before(scope, receive, send)
                await self._flood(receive, send)

        await self._healthy(scope, receive, flood)

    async def _flood(self, receive: Receive, send: Send) -> None:
        piece = self._text * max(1, _PIECE // len(self._text))
        left = self._size or math.inf
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while left > 0 and not gone.done() and not self._before.is_cut_short:
                body = piece if left >= len(piece) else piece[: int(left)]
                await send({"type": "http.response.body", "body": body, "more_body": True})
                left -= len(body)
                await asyncio.sleep(0)  # uvicorn waits only where the client reads more slowly
        finally:
            gone.cancel()


class Commented:
    """Keep the client of a stream waiting for the first event, with comments."""

    def __init__(self, healthy: ASGIApp, comment: bytes, released: asyncio.Event, seconds: float) -> None:
        self._healthy = healthy
        self._comment = comment
        self._released = released
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with comments behind the head, until the fault is switched off."""

        async def comment(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and _is_stream(message):
                while not self._released.is_set():
                    await send({"type": "http.response.body", "body": self._comment, "more_body": True})
                    if not await pause(receive, self._released, self._seconds):
                        return

        await self._healthy(scope, receive, comment)


class Compressed:
    """Answer in gzip, as a proxy in front of the engine may do. What there is of a stream is sent at once."""

    def __init__(self, healthy: ASGIApp) -> None:
        self._healthy = healthy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)

        async def compress(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [each for each in message["headers"] if each[0].lower() != b"content-length"]
                await send({**message, "headers": [*kept, (b"content-encoding", b"gzip")]})
                return
            flush = zlib.Z_SYNC_FLUSH if message.get("more_body") else zlib.Z_FINISH
            await send({**message, "body": packer.compress(message.get("body", b"")) + packer.flush(flush)})

        await self._healthy(scope, receive, compress)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_stream(head: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in head["headers"]
    )


def _lengthen(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    name, value = header
    return (name, b"%d" % (int(value) + _MISSING)) if name.lower() == b"content-length" else header


def _length_of_stream(message: Message) -> list[tuple[bytes, bytes]]:
    """Declare a length for a stream, one that it cannot reach."""
    if any(name.lower() == b"content-length" for name, _ in message["headers"]):
        return []
    return [(b"content-length", b"%d" % (1 << 30))]
