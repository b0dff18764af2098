"""Ends main streams in good order at the stop of the process, if their response needs nothing more from here.

A gateway that fails closed truncates a response whose stream breaks, whatever was left to do on it. A stream that ends
with status OK lets the rest of the response pass.
"""

import asyncio
from contextlib import suppress
from typing import Any, Final

import grpc.aio

from dp_extproc.attempt.main_stream import MainStream

_SECONDS: Final = 5.0
"""Seconds in which all such streams have to end. Thousands end in less than one second."""


class OpenStreams:
    """Reads the main streams, until the process stops."""

    __slots__ = ("_ending", "_is_stopping", "_none_is_ending", "_reads")

    def __init__(self) -> None:
        self._reads: dict[asyncio.Timeout, MainStream] = {}
        """The reads that wait for a next message."""
        self._ending = 0
        self._none_is_ending = asyncio.Event()
        self._is_stopping = False

    def may_end(self, stream: MainStream) -> bool:
        """Return whether a stream is to end while the rest of its attempt goes on."""
        return self._is_stopping and stream.passes_alone

    async def read(self, stream: MainStream, context: grpc.aio.ServicerContext) -> Any:
        """Read the next message. The result is EOF also if the stream is to end."""
        if not stream.is_routed:
            return await context.read()
        if self.may_end(stream):
            return grpc.aio.EOF
        timeout = asyncio.timeout(None)
        self._reads[timeout] = stream
        try:
            async with timeout:
                return await context.read()
        except TimeoutError:
            return grpc.aio.EOF
        finally:
            if self._reads.pop(timeout, None) is None:  # the read was interrupted
                self._ending -= 1
                if not self._ending:
                    self._none_is_ending.set()

    async def leave(self) -> None:
        """End the streams that can end, and from now on also those that can later."""
        self._is_stopping = True
        self.end_some()
        if self._ending:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SECONDS):
                    await self._none_is_ending.wait()

    def end_some(self) -> None:
        """End the streams that can end by now, if the process stops."""
        if not self._is_stopping:
            return
        for timeout, stream in list(self._reads.items()):
            if stream.passes_alone:
                del self._reads[timeout]
                self._ending += 1
                timeout.reschedule(0.0)
