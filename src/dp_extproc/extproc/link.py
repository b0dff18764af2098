"""The streams of one attempt, wherever they come in, and what is written to them."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import grpc
import grpc.aio

from dp_extproc.attempt.events import Immediate, Reply
from dp_extproc.extproc.codec import write_reply
from dp_extproc.extproc.supervision import Say, Stream, Supervision
from dp_extproc.response.logprobs import MOST_BYTES

_TEXT_SECONDS: Final = 5.0
"""For the rest of an answer whose head is there. Envoy waits 20 s for a reply."""


class Writer:
    """Writes replies to a stream, one at a time: gRPC allows no two writes at once.

    Nothing follows an immediate response.
    """

    __slots__ = ("_context", "_is_over", "_lock")

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self._is_over = False

    async def write(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            async with self._lock:
                if self._is_over:
                    return
                self._is_over = isinstance(reply, Immediate)
                await self._context.write(write_reply(reply))


class PrefillText:
    """The body of the prefill leg's answer, where it is wanted. Nothing is kept of any other, however long it is."""

    __slots__ = ("_chunks", "_is_wanted", "_size", "_whole")

    def __init__(self, *, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._chunks: list[bytes] = []
        self._size = 0
        self._whole = asyncio.Event()

    def take(self, chunk: bytes, *, end_of_stream: bool) -> None:
        self._size += len(chunk)
        if self._size > MOST_BYTES:
            self._chunks.clear()
        elif self._is_wanted:
            self._chunks.append(chunk)
        if end_of_stream:
            self.close()

    def close(self) -> None:
        """Nothing more will come."""
        self._whole.set()

    async def wait(self) -> bytes:
        """Wait for all of it, but not for long: it is on its way before the other leg's first token.

        Returns:
            Nothing, if it does not come, or is too large.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_TEXT_SECONDS):
                await self._whole.wait()
        return b"".join(self._chunks) if self._whole.is_set() and self._size <= MOST_BYTES else b""


class Link:
    """Brings what a supervision has to say to the streams that are open."""

    __slots__ = ("_tasks", "_writers", "prefill_text", "supervision")

    def __init__(self, supervision: Supervision, main: Writer) -> None:
        self.supervision = supervision
        self.prefill_text = PrefillText(is_wanted=supervision.sees_text)
        self._writers = {Stream.MAIN: main}
        self._tasks: set[asyncio.Task[None]] = set()

    def opened(self, prefill: Writer) -> None:
        """Take note of the prefill leg's stream."""
        self._writers[Stream.PREFILL] = prefill

    async def carry_out(self, said: list[Say], own: Stream | None = None) -> None:
        """Write to each stream what is to be said on it.

        Args:
            said: All of it.
            own: The stream whose coroutine this is. Envoy may cancel it at any time, also in the middle of a write;
                that must not keep the other streams from hearing what is meant for them.
        """
        for stream, reply in said:
            if stream is not own and (writer := self._writers.get(stream)) is not None:
                task = asyncio.create_task(_write(writer, reply))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        for stream, reply in said:
            if stream is own and (writer := self._writers.get(stream)) is not None:
                await writer.write((reply,))


async def _write(writer: Writer, reply: Reply) -> None:
    # A stream that is gone needs to hear nothing any more.
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, grpc.aio.BaseError):
        await writer.write((reply,))
