"""The gRPC side of ext_proc: one coroutine per stream, which moves messages between gRPC and the exchange."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol
from uuid import uuid4

import grpc
import grpc.aio
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest

from dp_extproc.extproc import names
from dp_extproc.extproc.codec import read_event, read_modes, write_reply
from dp_extproc.extproc.events import BodyMode, Continue, Event, Phase, Reply, ResponseHeaders
from dp_extproc.extproc.exchange import Decider, Exchange, ProtocolViolationError
from dp_extproc.placement.attempt import Attempt

SERVICE_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"

HOLD_SECONDS: Final = 60.0
"""How long a duplex body may pause while it is being held. Envoy has no timeout of its own in this mode."""

_log = logging.getLogger(__name__)


class StreamObserver(Protocol):
    """Told of every stream; for metrics."""

    def stream_opened(self) -> None: ...
    def stream_closed(self) -> None: ...
    def decided(self, exchange: Exchange, seconds: float) -> None:
        """A request was placed, answered or refused, in so many seconds of work."""
        ...


class ExtProcService:
    """Serves ext_proc streams: those of requests, and those of prefill legs."""

    def __init__(
        self,
        decider: Decider,
        legs: dict[str, Attempt],
        observer: StreamObserver,
        *,
        max_body: int,
        clock: Callable[[], float],
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self._decider = decider
        self._legs = legs
        self._observer = observer
        self._max_body = max_body
        self._clock = clock
        self._hold_seconds = hold_seconds

    def handler(self) -> grpc.GenericRpcHandler:
        """Make what a server registers. Answers are serialised already, most of them once and for all."""
        process = grpc.stream_stream_rpc_method_handler(self.process, ProcessingRequest.FromString, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})

    async def process(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream to its end."""
        leg = _leg_of(context)
        if leg is not None:
            await self._watch_leg(leg, context)
            return
        self._observer.stream_opened()
        try:
            first = await context.read()
            if first is not grpc.aio.EOF and not first.observability_mode:  # there an answer would be a violation
                await self._exchange(first, context)
        finally:
            self._observer.stream_closed()

    async def _exchange(self, message: Any, context: grpc.aio.ServicerContext) -> None:
        mode, response_duplex = read_modes(message)
        exchange = Exchange(self._decider, mode, self._max_body, response_duplex=response_duplex)
        try:
            while message is not grpc.aio.EOF:
                event = read_event(message)
                if event is not None:
                    for reply in self._advance(exchange, event):
                        await context.write(write_reply(reply))
                message = await (self._read_held(exchange, context) if mode is BodyMode.DUPLEX else context.read())
        except ProtocolViolationError as violation:
            _log.warning("ext_proc stream ended: %s", violation)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        finally:
            if (attempt := exchange.attempt) is not None:
                attempt.end(self._clock())
                self._legs.pop(attempt.leg, None)

    def _advance(self, exchange: Exchange, event: Event) -> tuple[Reply, ...]:
        """Hand an event to the exchange, and tell the books and the observer what came of it."""
        undecided = not exchange.is_decided
        began = self._clock()
        try:
            replies = exchange.receive(event)
        except ProtocolViolationError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            error_id = uuid4().hex
            _log.exception("unexpected error %s", error_id)
            replies = exchange.fail(f"unexpected error in the router; its log has the cause under {error_id}")
        if isinstance(event, ResponseHeaders):
            if exchange.attempt is not None:
                exchange.attempt.first_byte(event.status, began)
        elif undecided and exchange.is_decided:
            self._observer.decided(exchange, self._clock() - began)
        return replies

    async def _read_held(self, exchange: Exchange, context: grpc.aio.ServicerContext) -> Any:
        """Read the next message, but not for ever while the client's body is being held."""
        try:
            async with asyncio.timeout(self._hold_seconds if exchange.is_holding else None):
                return await context.read()
        except TimeoutError:
            for reply in exchange.expire():
                await context.write(write_reply(reply))
            return grpc.aio.EOF

    async def _watch_leg(self, leg: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream of a prefill leg: its response headers tell that prefill is over, and how it went."""
        while (message := await context.read()) is not grpc.aio.EOF:
            event = read_event(message)
            if isinstance(event, ResponseHeaders):
                if (attempt := self._legs.get(leg)) is not None:
                    attempt.prefill_answered(event.status, self._clock())
                await context.write(_GO_ON_RESPONSE)
            elif event is not None:
                await context.write(_GO_ON_REQUEST)


_GO_ON_RESPONSE: Final = write_reply(Continue(Phase.RESPONSE_HEADERS))
_GO_ON_REQUEST: Final = write_reply(Continue(Phase.REQUEST_HEADERS))


def _leg_of(context: grpc.aio.ServicerContext) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == names.LEG and value:
            return str(value)
    return None
