"""How streams end before the process does: those of answers that need nothing more from here end in good order.

A gateway that fails closed cuts an answer whose stream breaks, whatever is left to be said on it. One that ends with
status OK lets the rest of the answer pass.
"""

import asyncio
from contextlib import suppress
from typing import Any, Final

import grpc.aio

from dp_extproc.attempt.main_stream import MainStream

_SECONDS: Final = 5.0
"""For all streams to end. Thousands end in less than one."""


class OpenStreams:
    """Reads the streams of requests, until the process leaves."""

    __slots__ = ("_ending", "_is_leaving", "_none_is_ending", "_reads")

    def __init__(self) -> None:
        self._reads: dict[asyncio.Timeout, MainStream] = {}
        """What waits for a next message."""
        self._ending = 0
        self._none_is_ending = asyncio.Event()
        self._is_leaving = False

    def may_end(self, stream: MainStream) -> bool:
        """Tell whether a stream is to end, and whatever belongs to its request is to go on without it."""
        return self._is_leaving and stream.passes_alone

    async def read(self, stream: MainStream, context: grpc.aio.ServicerContext) -> Any:
        """Read the next message; EOF also if the stream is to end."""
        if not stream.is_routed:
            return await context.read()
        if self.may_end(stream):
            return grpc.aio.EOF
        patience = asyncio.timeout(None)
        self._reads[patience] = stream
        try:
            async with patience:
                return await context.read()
        except TimeoutError:
            return grpc.aio.EOF
        finally:
            if self._reads.pop(patience, None) is None:  # it was to end
                self._ending -= 1
                if not self._ending:
                    self._none_is_ending.set()

    async def leave(self) -> None:
        """End what can end; also, from now on, what can later."""
        self._is_leaving = True
        self.end_some()
        if self._ending:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SECONDS):
                    await self._none_is_ending.wait()

    def end_some(self) -> None:
        """End what can by now, if the process leaves."""
        if not self._is_leaving:
            return
        for patience, stream in list(self._reads.items()):
            if stream.passes_alone:
                del self._reads[patience]
                self._ending += 1
                patience.reschedule(0.0)
