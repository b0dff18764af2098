"""The ext_proc streams of attempts: what is written to them, and how the leg of an attempt finds it."""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import grpc
import grpc.aio

from dp_extproc import contract
from dp_extproc.attempt import events as on
from dp_extproc.attempt.attempt import Attempt
from dp_extproc.attempt.events import BufferBody, Command, Continue, Enqueue, Immediate, Phase, Reply, StreamBody, ToLeg
from dp_extproc.extproc.codec import write_reply
from dp_extproc.extproc.waiting import Waiting

PROCEED: Final[dict[type, Reply]] = {
    on.LegOpened: Continue(Phase.REQUEST_HEADERS),
    on.LegHeaders: Continue(Phase.RESPONSE_HEADERS),
    on.LegBody: Continue(Phase.RESPONSE_BODY),
}
"""The reply that lets a message of a leg pass, by its kind."""
_LEG_REPLIES: Final[dict[ToLeg, Reply]] = {
    ToLeg.STREAM_BODY: StreamBody(),
    ToLeg.BUFFER_BODY: BufferBody(),
    # It ends the leg; no client reads it.
    ToLeg.CANCEL: Immediate(503, b"", (), "cancelled", {contract.META_REASON: "cancelled"}),
}


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


class MirroredLeg(Writer):
    """Carries out the commands for a prefill leg that Envoy mirrors: as replies on the ext_proc stream of the leg."""

    __slots__ = ("message",)

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        super().__init__(context)
        self.message: type = on.LegOpened
        """The kind of the last message, which is the next to get a reply."""

    def reply(self, command: ToLeg) -> Reply:
        """Give the reply that carries out a command."""
        return PROCEED[self.message] if command is ToLeg.PROCEED else _LEG_REPLIES[command]


class Streams:
    """The open streams of one attempt."""

    __slots__ = ("_tasks", "attempt", "leg", "main", "token", "waiting")

    def __init__(self, attempt: Attempt, main: Writer) -> None:
        self.attempt = attempt
        self.main = main
        self.token = ""
        """Token of the leg, once streams can find the attempt by it."""
        self.leg: MirroredLeg | None = None
        self.waiting: Waiting | None = None
        """The place of the request in the admission queue."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_writing(self) -> bool:
        """Whether tasks still have replies to write."""
        return bool(self._tasks)

    async def carry_out(self, commands: list[Command], own: Writer) -> None:
        """Write to each stream what is meant for it.

        Args:
            commands: All commands.
            own: The stream whose coroutine this is. Envoy may cancel it at any time, also in the middle of a write;
                that must not keep the other streams from what is meant for them.
        """
        if commands and (replies := self.post(commands, own)):
            await own.write(replies)

    def post(self, commands: list[Command], own: Writer | None = None) -> list[Reply]:
        """Write the replies of each stream but *own*, in tasks of their own.

        Returns:
            The replies of *own*, which its coroutine has to write.
        """
        leg = self.leg
        to_main: list[Reply] = []
        to_leg: list[Reply] = []
        for command in commands:
            if isinstance(command, ToLeg):
                if leg is not None:
                    to_leg.append(leg.reply(command))
            elif not isinstance(command, Enqueue):
                to_main.append(command)
        if to_main and own is not self.main:
            self._start(self.main, to_main)
        if to_leg and leg is not None and own is not leg:
            self._start(leg, to_leg)
        return to_main if own is self.main else to_leg

    def _start(self, writer: Writer, replies: list[Reply]) -> None:
        task = asyncio.create_task(_write_if_open(writer, replies))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _write_if_open(writer: Writer, replies: list[Reply]) -> None:
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, grpc.aio.BaseError):
        await writer.write(replies)


class Registry:
    """The attempts whose main stream is open, or whose leg may still open.

    Only the token of its leg, which cannot be guessed, leads another stream to an attempt.
    """

    __slots__ = ("_all", "_by_token")

    def __init__(self) -> None:
        self._all: dict[Streams, None] = {}
        self._by_token: dict[str, Streams] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Streams]:
        return iter(list(self._all))

    def add(self, streams: Streams) -> None:
        self._all[streams] = None

    def name(self, streams: Streams, token: str) -> None:
        """Let the leg of an attempt find it."""
        streams.token = token
        self._by_token[token] = streams

    def find(self, token: str) -> Streams | None:
        return self._by_token.get(token)

    def discard(self, streams: Streams) -> None:
        """Remove an attempt that gets no other stream."""
        self._all.pop(streams, None)
        self._by_token.pop(streams.token, None)
