"""The ext_proc streams of attempts: what is written to them, and how the leg of an attempt finds it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

import grpc
import grpc.aio

from dp_extproc import contract
from dp_extproc.attempt import events as on
from dp_extproc.attempt.attempt import Attempt
from dp_extproc.attempt.events import (
    AbortRequests,
    BufferBody,
    Command,
    Continue,
    Enqueue,
    Immediate,
    LegEvent,
    Phase,
    Reply,
    SendLeg,
    StreamBody,
    ToLeg,
)
from dp_extproc.extproc.codec import write_reply
from dp_extproc.extproc.direct_leg import DirectLegs
from dp_extproc.extproc.waiting import Waiting
from dp_extproc.legs.client import SentLeg
from dp_extproc.scheduling.decision import LegAbort

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
    """Writes replies to a stream, in the order in which they were put and one at a time, as gRPC requires.

    Nothing follows an immediate response.
    """

    __slots__ = ("_context", "_is_over", "_lock", "_replies", "precedent")

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self._is_over = False
        self._replies: deque[Reply] = deque()
        self.precedent: Callable[[], Awaitable[object]] | None = None
        """What the next immediate response has to wait for."""

    @property
    def has_replies(self) -> bool:
        """Whether replies are still to be written."""
        return bool(self._replies)

    @property
    def is_idle(self) -> bool:
        """Whether no reply is to be written, nor is being written."""
        return not (self._replies or self._lock.locked())

    def put(self, reply: Reply) -> None:
        """Put a reply behind all others, in the same step in which the attempt has changed its state.

        So the order on the wire is that of the attempt, whichever coroutine gets to write first.
        """
        self._replies.append(reply)

    async def flush(self) -> None:
        """Write all replies, whoever has put them."""
        while self._replies:
            async with self._lock:
                if not self._replies:
                    return
                reply = self._replies.popleft()
                if self._is_over:
                    continue
                self._is_over = isinstance(reply, Immediate)
                if self._is_over and self.precedent is not None:
                    await self.precedent()
                await self._context.write(write_reply(reply))


class MirroredLeg(Writer):
    """Carries out the commands for a prefill leg that Envoy mirrors: as replies on the ext_proc stream of the leg."""

    __slots__ = ("message",)

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        super().__init__(context)
        self.message: type = on.LegOpened
        """The kind of the last message, which is the next to get a reply."""

    def carry_out(self, command: ToLeg) -> None:
        """Put the reply that carries out a command."""
        self.put(PROCEED[self.message] if command is ToLeg.PROCEED else _LEG_REPLIES[command])


Report = Callable[["Streams", LegEvent], object]
"""Receives the events of a prefill leg that the service has sent for an attempt."""


class Streams:
    """The open streams of one attempt."""

    __slots__ = ("_legs", "_report", "_tasks", "attempt", "client_keys", "hold", "leg", "main", "token", "waiting")

    def __init__(
        self, attempt: Attempt, main: Writer, legs: DirectLegs | None = None, report: Report | None = None
    ) -> None:
        """Set up.

        Args:
            attempt: The attempt.
            main: Its main stream.
            legs: Sends prefill legs, where the service does that.
            report: Receives the events of a leg that was sent.
        """
        self.attempt = attempt
        self.main = main
        self._legs = legs
        self._report = report
        self.token = ""
        """Token of the leg, once streams can find the attempt by it."""
        self.client_keys: Mapping[str, tuple[int, ...]] = {}
        """The keys by which the client finds the attempt, each with the prompts that it stands for."""
        self.leg: MirroredLeg | SentLeg | None = None
        self.hold: asyncio.TimerHandle | None = None
        """Ends the time for which the response headers may be held, where that is less than a sweep takes."""
        self.waiting: Waiting | None = None
        """The place of the request in the admission queue."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def carry_out(self, commands: list[Command], own: Writer) -> None:
        """Carry out commands in the coroutine of a stream.

        Args:
            commands: All commands.
            own: The stream whose coroutine this is. Envoy may cancel it at any time, also in the middle of a write;
                that must not keep the other streams from what is meant for them.
        """
        if commands:
            self.post(commands, own)
        if own.has_replies:
            await own.flush()

    def post(self, commands: list[Command], own: Writer | None = None) -> None:
        """Put the replies of each stream into its queue, and write those of each stream but *own* in a task."""
        for command in commands:
            if isinstance(command, ToLeg):
                if self.leg is not None:
                    self.leg.carry_out(command)
            elif isinstance(command, SendLeg):
                assert self._legs is not None  # noqa: S101 - the configuration has both or none
                assert self._report is not None  # noqa: S101
                self.leg = self._legs.send(command, partial(self._report, self))
            elif isinstance(command, LegAbort):
                if self._legs is not None:
                    self.main.precedent = self._legs.abort(command) or self.main.precedent
            elif not isinstance(command, Enqueue | AbortRequests):
                self.main.put(command)
        for writer in (self.main, self.leg):
            if isinstance(writer, Writer) and writer is not own and writer.has_replies:
                task = asyncio.create_task(_flush_if_open(writer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)


async def _flush_if_open(writer: Writer) -> None:
    with suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError, grpc.aio.BaseError):
        await writer.flush()


class Registry:
    """The attempts whose main stream is open, or whose leg may still open.

    Only the token of its leg, which cannot be guessed, leads another stream to an attempt.
    """

    __slots__ = ("_all", "_by_client_key", "_by_token")

    def __init__(self) -> None:
        self._all: dict[Streams, None] = {}
        self._by_token: dict[str, Streams] = {}
        self._by_client_key: dict[str, list[Streams]] = {}

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

    def name_by_client(self, streams: Streams, keys: Mapping[str, tuple[int, ...]]) -> None:
        """Let the client find an attempt by the keys of its ids, each with the prompts that it stands for."""
        streams.client_keys = keys
        for key in keys:
            self._by_client_key.setdefault(key, []).append(streams)

    def find_by_client(self, key: str) -> list[tuple[Streams, tuple[int, ...]]]:
        """Return the attempts with a key, and the prompts that it stands for."""
        return [(each, each.client_keys[key]) for each in self._by_client_key.get(key, ())]

    def find(self, token: str) -> Streams | None:
        return self._by_token.get(token)

    def discard(self, streams: Streams) -> None:
        """Remove an attempt that gets no other stream."""
        self._all.pop(streams, None)
        self._by_token.pop(streams.token, None)
        keys, streams.client_keys = streams.client_keys, {}
        for key in keys:
            left = self._by_client_key[key]
            left.remove(streams)
            if not left:
                del self._by_client_key[key]
