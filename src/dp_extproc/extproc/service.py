"""The gRPC side of ext_proc: one coroutine for each stream moves messages between gRPC and the attempts.

There are three kinds of streams: the main stream of a request, the stream of its prefill leg, and the stream that sees
the first event of its response. This module has no rule of its own: what follows from a message is decided in
:mod:`dp_extproc.attempt`.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final
from uuid import uuid4

import grpc
import grpc.aio
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from google.protobuf.message import DecodeError

from dp_extproc import contract
from dp_extproc.attempt.attempt import Attempt, ProtocolViolationError
from dp_extproc.attempt.effects import Environment
from dp_extproc.attempt.events import (
    Command,
    Continue,
    Enqueue,
    Event,
    FirstEventRead,
    InternalError,
    LegClosed,
    MainClosed,
    Phase,
    QueueExpired,
    ResponseBody,
    ResponseHeaders,
    RoomFreed,
    StreamBody,
)
from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.attempt.gateways import BundledEnvoy, Gateway
from dp_extproc.attempt.intake import Decider
from dp_extproc.attempt.listener import AttemptListener
from dp_extproc.config.reliability import RetrySettings, SupervisionSettings
from dp_extproc.extproc.codec import read_event, read_leg_event, read_modes, read_subset_hint, write_reply
from dp_extproc.extproc.listeners import Listeners
from dp_extproc.extproc.stopping import OpenStreams
from dp_extproc.extproc.streams import PROCEED, MirroredLeg, Registry, Streams, Writer
from dp_extproc.extproc.waiting import Waiting
from dp_extproc.response.first_event import FirstEvent
from dp_extproc.scheduling.admission import AdmissionQueue

SERVICE_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"

BODY_PAUSE_SECONDS: Final = 60.0
"""Seconds for which a duplex body may pause. Envoy has no timeout of its own in this mode."""
SWEEP_SECONDS: Final = 0.25
"""Seconds between two looks at the deadlines of attempts."""

_SUPERVISION: Final = SupervisionSettings()
_BUNDLED_ENVOY: Final = BundledEnvoy()

_log = logging.getLogger(__name__)


class ExtProcService:
    """Serves ext_proc streams."""

    def __init__(
        self,
        decider: Decider,
        listeners: Iterable[AttemptListener],
        *,
        gateway: Gateway = _BUNDLED_ENVOY,
        supervision: SupervisionSettings = _SUPERVISION,
        budget: RetryBudget | None = None,
        queue: AdmissionQueue | None = None,
        max_body: int,
        clock: Callable[[], float],
        body_pause: float = BODY_PAUSE_SECONDS,
    ) -> None:
        """Set up.

        Args:
            decider: Scheduling.
            listeners: Receive what happens to attempts.
            gateway: The kind of the gateway that sends requests.
            supervision: How far legs are supervised.
            budget: The budget of retries; None for one of the usual size.
            queue: Where requests wait for room; the same that scheduling has.
            max_body: Size in bytes above which a request body is refused.
            clock: Monotonic seconds; the same clock as that of the load cache.
            body_pause: Seconds for which a duplex body may pause.
        """
        self._listener = Listeners(listeners)
        self._gateway = gateway
        self._environment = Environment(
            decider=decider,
            gateway=gateway,
            listener=self._listener,
            budget=budget or RetryBudget(RetrySettings()),
            supervision=supervision,
            max_body=max_body,
            body_pause=body_pause,
            clock=clock,
        )
        self._queue = queue
        self._clock = clock
        self._open = OpenStreams()
        self._registry = Registry()

    def handler(self) -> grpc.GenericRpcHandler:
        """Make the handler that a gRPC server registers. Its replies are serialised already, most of them only once."""
        process = grpc.stream_stream_rpc_method_handler(self.process, ProcessingRequest.FromString, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})

    async def leave(self) -> None:
        """End the streams that Envoy can do without, before it sees the others break: the process is about to end."""
        await self._open.leave()

    async def sweep(self) -> None:
        """Let time pass for the attempts. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self._clock()
            self._open.end_some()
            for streams in self._registry:
                attempt = streams.attempt
                if attempt.deadline < now:
                    streams.post(self._let(streams, None))
                elif attempt.is_closed and now > attempt.leg.late_until:
                    self._registry.discard(streams)

    async def process(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream to its end."""
        token, stage = _address_of(context) if self._gateway.opens_leg_streams else ("", "")
        try:
            if stage:
                await self._serve_first_event(token, context)
            elif token:
                await self._serve_leg(token, context)
            else:
                await self._serve_main(context)
        except DecodeError as error:
            _log.warning("ext_proc stream ended: a message cannot be read: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message cannot be read")

    async def _serve_main(self, context: grpc.aio.ServicerContext) -> None:
        self._listener.attempt_opened()
        try:
            first = await context.read()
            if first is not grpc.aio.EOF and not first.observability_mode:  # there a reply would be a violation
                await self._serve_attempt(first, context)
        finally:
            self._listener.attempt_closed()

    async def _serve_attempt(self, message: Any, context: grpc.aio.ServicerContext) -> None:
        gateway = self._gateway
        subset = read_subset_hint(message) if gateway.names_subsets else None
        attempt = Attempt(self._environment, *read_modes(message), subset)
        streams = Streams(attempt, Writer(context))
        self._registry.add(streams)
        try:
            while message is not grpc.aio.EOF:
                event = read_event(message, gateway.session_header)
                if event is not None:
                    await streams.carry_out(self._receive(streams, event), streams.main)
                message = await self._open.read(attempt.main, context)
        except ProtocolViolationError as violation:
            _log.warning("ext_proc stream ended: %s", violation)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        finally:
            closed = MainClosed(keeps_leg=self._open.may_end(attempt.main))
            streams.post(self._receive(streams, closed))
            if self._clock() > attempt.leg.late_until:
                self._registry.discard(streams)
            merging = attempt.main.merging
            if merging is not None and merging.problem is not None:
                _log.warning("log probabilities of a prompt were left out: %s", merging.problem)

    def _receive(self, streams: Streams, event: Event) -> list[Command]:
        """Have an attempt receive an event that may settle where the request goes."""
        attempt = streams.attempt
        commands = self._let(streams, event)
        if not streams.token and (token := attempt.token):
            self._registry.name(streams, token)  # before the leg can open
        if streams.waiting is not None:
            if not attempt.main.is_queued:
                streams.waiting.leave()
                streams.waiting = None
        elif self._queue is not None and attempt.main.is_queued:
            (place,) = (command for command in commands if isinstance(command, Enqueue))
            streams.waiting = Waiting(self._queue, place, partial(self._go_on, streams))
        return commands

    def _go_on(self, streams: Streams, event: RoomFreed | QueueExpired) -> None:
        streams.post(self._receive(streams, event))

    def _let(self, streams: Streams, event: Event | None) -> list[Command]:
        """Have an attempt receive an event; None for the time that has passed."""
        attempt, now = streams.attempt, self._clock()
        try:
            return attempt.advance(now) if event is None else attempt.receive(event, now)
        except ProtocolViolationError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            error_id = uuid4().hex
            _log.exception("unexpected error %s", error_id)
            message = f"unexpected error in the router; its log has the cause under {error_id}"
            return attempt.receive(InternalError(message), now)

    async def _serve_leg(self, token: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream of a prefill leg. One that belongs to no attempt of this process passes."""
        leg = MirroredLeg(context)
        streams = self._registry.find(token)
        if streams is None or streams.leg is not None or not streams.attempt.leg.may_open:
            while (message := await context.read()) is not grpc.aio.EOF:
                if (reply := PROCEED.get(type(read_leg_event(message)))) is not None:
                    await leg.write((reply,))
            return
        streams.leg = leg
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                if (event := read_leg_event(message)) is not None:
                    leg.message = type(event)
                    await streams.carry_out(self._let(streams, event), leg)
        finally:
            streams.leg = None
            streams.post(self._let(streams, LegClosed()))
            if streams.attempt.is_closed:
                self._registry.discard(streams)

    async def _serve_first_event(self, token: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream that sees how a response begins; it is closed as soon as that is known."""
        streams = self._registry.find(token)
        first = FirstEvent()
        while (message := await context.read()) is not grpc.aio.EOF:
            event = read_event(message)
            if isinstance(event, ResponseHeaders):  # sent only if the request was not read
                await context.write(_STREAM_BODY if event.is_events else _PASS_HEADERS)
                if not event.is_events:
                    return
                continue
            if not isinstance(event, ResponseBody):
                if (reply := PROCEED.get(type(read_leg_event(message)))) is not None:
                    await context.write(write_reply(reply))
                continue
            first.feed(event.data, end_of_stream=event.end_of_stream)
            is_done = first.is_known or event.end_of_stream
            if is_done and streams is not None:  # before the reply, which may end the stream and this coroutine
                streams.post(self._let(streams, FirstEventRead(first.error)))
            await context.write(_PASS_BODY)
            if is_done:
                return


_PASS_BODY: Final = write_reply(Continue(Phase.RESPONSE_BODY))
_PASS_HEADERS: Final = write_reply(Continue(Phase.RESPONSE_HEADERS))
_STREAM_BODY: Final = write_reply(StreamBody(Phase.RESPONSE_HEADERS))


def _address_of(context: grpc.aio.ServicerContext) -> tuple[str, str]:
    """Read which attempt a stream belongs to, and which of its streams it is; both empty for a main stream."""
    token = stage = ""
    for name, value in context.invocation_metadata() or ():
        if name == contract.LEG:
            token = str(value)
        elif name == contract.STAGE:
            stage = str(value)
    return token, stage
