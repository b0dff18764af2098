"""Do what all inference paths share: read a request, wait for its legs, stream them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse

from dp_extproc.lab.engine.api.fields import (
    InvalidBodyError,
    InvalidTypeError,
    Reader,
    RoutingFields,
    legs,
    read_rank_header,
)
from dp_extproc.lab.engine.api.journal import Record
from dp_extproc.lab.engine.engine import Engine
from dp_extproc.lab.engine.leg import Failure, Finished
from dp_extproc.lab.engine.release import Disconnect
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import EngineKind
from dp_extproc.lab.engine.text import output_text
from dp_extproc.lab.engine.ticket import Ticket

DISCONNECTED = Failure(None, "client disconnected")
LISTENER = "engine.dp_rank"
"""Key of the rank in the ASGI scope of a listener that belongs to one rank."""
DONE = "data: [DONE]\n\n"
_bool = TypeAdapter(bool)


@dataclass(frozen=True, slots=True)
class Update:
    """New tokens of one sequence, or its end, or both."""

    index: int
    ticket: Ticket
    tokens: int
    """Output tokens so far."""
    known: int
    """Output tokens that earlier updates had."""
    end: Finished | Failure | None

    @property
    def has_tokens(self) -> bool:
        return self.tokens > self.known

    @property
    def text(self) -> str:
        """Return the text of the new tokens; empty for an end without any."""
        return "".join(map(output_text, self.ticket.tokens[self.known : self.tokens]))


@dataclass(slots=True)
class Exchange:
    """One inference request."""

    engine: Engine
    request: Request
    record: Record
    fails_after: int | None = None
    """Tokens after which the scheduler gives it up; None for never."""
    tickets: list[Ticket] = field(default_factory=list)
    streaming: bool = False
    """The value in the body."""
    samples: int = 1
    """Sequences per prompt (``n``)."""
    _failing: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.request.url.path

    def parse(self) -> dict[str, Any]:
        """Read the body.

        Raises:
            InvalidBodyError: It is not a JSON object.
        """
        raw = self.record.body or b""
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            place = {"type": "json_invalid", "loc": ("body", len(raw)), "msg": "JSON decode error", "input": {}}
            raise InvalidBodyError([{**place, "ctx": {"error": str(error)}}]) from None
        if not isinstance(body, dict):
            wrong = "Input should be a valid dictionary or object to extract fields from"
            value = body if isinstance(body, int | float | bool | None) else "..."
            raise InvalidBodyError([{"type": "model_attributes_type", "loc": ("body",), "msg": wrong, "input": value}])
        self.streaming = self._truth("stream", body.get("stream"))
        return body

    def _truth(self, name: str, value: Any) -> bool:
        """Read a truth value as pydantic does, or strictly as ``/generate`` of later releases.

        Raises:
            InvalidBodyError: It is none.
            InvalidTypeError: It only looks like one, and the path is strict.
        """
        if value is None or isinstance(value, bool):
            return value is True
        if self.path == "/generate" and self.engine.settings.release.strict_generate:
            raise InvalidTypeError(f"invalid type: {type(value).__name__} `{value}`, expected a boolean")
        try:
            return _bool.validate_python(value)
        except ValidationError as error:
            (problem,) = error.errors(include_url=False)
            place = {"type": problem["type"], "loc": ("body", name), "msg": problem["msg"], "input": value}
            raise InvalidBodyError([place]) from None

    def fields(self, body: Mapping[str, Any]) -> RoutingFields:
        """Read the routing fields from the body and the headers."""
        settings = self.engine.settings
        if settings.kind is EngineKind.VLLM:
            return read_rank_header(self.request.headers)
        return Reader(settings.release, self.path, settings.header_overrides).read(body, self.request.headers)

    def submit(
        self,
        fields: RoutingFields,
        prompts: list[bytes],
        max_new_tokens: int,
        *,
        samples: int = 1,
        is_batch: bool = False,
        unknown_id: int | None = None,
    ) -> None:
        """Hand the sequences to the schedulers.

        Args:
            fields: The routing fields.
            prompts: The tokens of each prompt.
            max_new_tokens: Output tokens of every sequence.
            samples: Sequences per prompt.
            is_batch: Whether the prompts came as a list.
            unknown_id: A token id among them that no vocabulary has.

        Raises:
            RefusedError: SGLang answers 400.
        """
        self.samples = samples
        if (listener := self.request.scope.get(LISTENER)) is not None:
            fields.routed_dp_rank = listener  # no controller is in between
        disaggregated = self.engine.settings.role is not Role.UNIFIED
        if disaggregated and isinstance(fields.bootstrap_room, list) and not is_batch and samples == 1:
            # Lists are only taken apart for batches; this one reaches the controller as it is.
            self.engine.kill("TypeError: unsupported operand type(s) for %: 'list' and 'int' (bootstrap_room)")
        wanted = legs(fields, prompts, max_new_tokens, samples, is_batch=is_batch)
        self.tickets = self.record.tickets = self.engine.submit(wanted, streaming=self.streaming)
        for ticket in self.tickets:
            ticket.work.unknown_id = unknown_id
        if self.fails_after is not None:
            self._failing = [asyncio.ensure_future(self._fail(each, self.fails_after)) for each in self.tickets]

    async def finish(self) -> Failure | None:
        """Wait until all sequences have ended, checking from time to time whether the client is still there.

        Returns:
            The first failure, if there is one; an abort is none.
        """
        seconds = self._poll_seconds
        for ticket in self.tickets:
            while not await ticket.wait_for_end(seconds):
                if await self.request.is_disconnected():
                    self.abort()
        return next((end for t in self.tickets if isinstance(end := t.end, Failure) and end.status is not None), None)

    async def first(self) -> None:
        """Wait for the first token or end of any sequence ("kick-start"), or for the client to go."""
        while not any(ticket.tokens or ticket.end for ticket in self.tickets):
            waits = [asyncio.ensure_future(ticket.wait(0, self._poll_seconds)) for ticket in self.tickets]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            silent = not any(ticket.tokens or ticket.end for ticket in self.tickets)
            if silent and await self.request.is_disconnected():
                self.abort()

    async def updates(self) -> AsyncIterator[Update]:
        """Iterate over tokens and ends: the first token at once, then ``stream_interval`` at a time."""
        interval = self.engine.settings.stream_interval
        if len(self.tickets) == 1:
            async for update in _follow(0, self.tickets[0], interval):
                yield update
            return
        queue: asyncio.Queue[Update] = asyncio.Queue()
        pumps = [asyncio.ensure_future(_pump(index, t, interval, queue)) for index, t in enumerate(self.tickets)]
        open_ends = len(pumps)
        try:
            while open_ends:
                update = await queue.get()
                open_ends -= update.end is not None
                yield update
        finally:
            for pump in pumps:
                pump.cancel()

    def abort(self) -> None:
        """End all sequences, as the client is gone."""
        for ticket in self.tickets:
            self.engine.end(ticket, DISCONNECTED)

    def stream(self, events: AsyncIterator[str]) -> StreamingResponse:
        """Answer with server-sent events, each a whole event with its empty line."""
        return StreamingResponse(events, media_type="text/event-stream", background=BackgroundTask(self._after_stream))

    async def _after_stream(self) -> None:
        """Do after a stream what the release does when its client has left in the middle."""
        if all(ticket.end for ticket in self.tickets):
            return
        settings = self.engine.settings
        action = settings.release.after_disconnect
        if action is Disconnect.RUNS_ON:
            self.engine.forget(self.tickets)
            return
        if action is Disconnect.ABORTS_LATER:
            if self.path == "/v1/responses":
                return
            await asyncio.sleep(settings.timeouts.background_abort * settings.time_scale)
        self.abort()

    async def _fail(self, ticket: Ticket, after: int) -> None:
        if after:
            await ticket.wait(after - 1)
        self.engine.end(ticket, Failure(500, f"a fault is switched on, req.rid={ticket.leg.rid!r}"))

    @property
    def _poll_seconds(self) -> float:
        settings = self.engine.settings
        return settings.timeouts.disconnect_poll * settings.time_scale


def event(data: Any, name: str | None = None) -> str:
    """Write one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {msgspec.json.encode(data).decode()}\n\n"


def integer(body: Mapping[str, Any], *names: str) -> int | None:
    """Read the first of several fields that is given, as pydantic reads an integer.

    Raises:
        InvalidBodyError: It is not one.
    """
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        try:
            return _integer(value)
        except ValueError:
            wrong = {"type": "int_type", "loc": ("body", name), "msg": "Input should be a valid integer"}
            raise InvalidBodyError([{**wrong, "input": value}]) from None
    return None


def missing(name: str, body: Mapping[str, Any]) -> InvalidBodyError:
    """Build the error for a missing field."""
    return InvalidBodyError([{"type": "missing", "loc": ("body", name), "msg": "Field required", "input": dict(body)}])


def wrong_type(name: str, value: Any, expected: str) -> InvalidBodyError:
    """Build the error for a field of the wrong shape."""
    found = value if isinstance(value, int | float | bool | None) else type(value).__name__
    return InvalidBodyError(
        [
            {
                "type": f"{expected}_type",
                "loc": ("body", name),
                "msg": f"Input should be a valid {expected}",
                "input": found,
            }
        ]
    )


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    if not isinstance(value, int | float | str):
        raise ValueError  # noqa: TRY004 - pydantic's kind of error
    return int(value)


async def _follow(index: int, ticket: Ticket, interval: int) -> AsyncIterator[Update]:
    known, wanted = 0, 1
    while True:
        await ticket.wait(wanted - 1)
        ended = ticket.end is not None
        count = len(ticket.tokens)
        while wanted <= count or (ended and known < count):
            known, before, wanted = min(wanted, count), known, wanted + interval
            last = ended and known == count and isinstance(ticket.end, Finished)
            yield Update(index, ticket, known, before, ticket.end if last else None)
            if last:
                return
        if ended:
            yield Update(index, ticket, known, known, ticket.end)
            return


async def _pump(index: int, ticket: Ticket, interval: int, queue: "asyncio.Queue[Update]") -> None:
    async for update in _follow(index, ticket, interval):
        queue.put_nowait(update)


Handler = Callable[[Exchange], Any]
