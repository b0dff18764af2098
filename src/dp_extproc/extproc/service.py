"""The gRPC side of ext_proc: one coroutine for each stream moves messages between gRPC and the attempts.

There are three kinds of streams: the main stream of a request, the stream of a prefill leg that Envoy mirrors, and the
stream that sees the first event of a response. This module has no rule of its own: what follows from a message is
decided in :mod:`dp_extproc.attempt`.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final
from uuid import uuid4

import grpc
import grpc.aio
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from google.protobuf.message import DecodeError

from dp_extproc import contract
from dp_extproc.attempt import events as on
from dp_extproc.attempt.attempt import Attempt, ProtocolViolationError
from dp_extproc.attempt.effects import Environment
from dp_extproc.attempt.events import AbortRequests, Command, Continue, Enqueue, Event, Mutate, Phase, StreamBody
from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.attempt.first_event_watch import report
from dp_extproc.attempt.gateways import BUNDLED, BundledEnvoy, Gateway
from dp_extproc.attempt.intake import Decider
from dp_extproc.attempt.listener import AttemptListener
from dp_extproc.config.reliability import RetrySettings, SupervisionSettings
from dp_extproc.extproc.codec import read_event, read_leg_event, read_modes, read_subset_hint, write_reply
from dp_extproc.extproc.direct_leg import DirectLegs
from dp_extproc.extproc.listeners import AttemptListeners
from dp_extproc.extproc.peers import Peers
from dp_extproc.extproc.pieces import pass_piece
from dp_extproc.extproc.stopping import OpenStreams
from dp_extproc.extproc.streams import PROCEED, MirroredLeg, Registry, Streams, Writer
from dp_extproc.extproc.waiting import Waiting
from dp_extproc.response.first_event import FirstEventReader
from dp_extproc.response.renaming import Renamer
from dp_extproc.scheduling.admission import AdmissionQueue

SERVICE_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"

BODY_PAUSE_SECONDS: Final = 60.0
"""Seconds for which a duplex body may pause. Envoy has no timeout of its own in this mode."""
SWEEP_SECONDS: Final = 0.25
"""Seconds between two looks at the deadlines of attempts."""
_TIMER_SLACK_SECONDS: Final = 0.002
"""Seconds by which a timer may come too early: event loops round to milliseconds."""

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
        legs: DirectLegs | None = None,
        announce_abort: Callable[[str], object] = lambda _key: None,
    ) -> None:
        """Set up; :class:`.Environment` describes most arguments.

        *legs* sends the prefill legs, where the service does that. *queue* is where requests wait for room, the same
        that scheduling has. *announce_abort* is called with the key of each request that a client ends by its id, so
        that other processes end theirs. *clock* is also that of the load cache.
        """
        self._listener = AttemptListeners(listeners)
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
        self._peers = Peers()
        self._legs = legs
        self._announce_abort = announce_abort
        self._registry = Registry()

    def handler(self) -> grpc.GenericRpcHandler:
        """Make the handler that a gRPC server registers.

        Its messages are not parsed yet, since some need not be. Its replies are serialised already, most of them once.
        """
        process = grpc.stream_stream_rpc_method_handler(self.process, None, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})

    async def leave(self, cut_short: asyncio.Event | None = None) -> None:
        """End the main streams that Envoy can do without, because the process is about to end and break the others.

        Prefill legs of this process are awaited before, as long as *cut_short* is not set.
        """
        await self._open.leave()
        if self._legs is not None and len(self._legs):
            waits = [asyncio.ensure_future(self._legs.all_ended())]
            if cut_short is not None:
                waits.append(asyncio.ensure_future(_is_set(cut_short)))
            timeout = self._environment.supervision.longest_prefill
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()
            await self._open.leave()

    async def close(self) -> None:
        """Cancel the prefill legs in flight, once no stream is served any more."""
        if self._legs is not None:
            await self._legs.close()

    def abort(self, key: str) -> None:
        """End the requests of this process that a client has sent under the id of a key."""
        for streams, prompts in self._registry.find_by_client(key):
            self._receive_and_post(streams, on.AbortWanted(prompts))

    async def sweep(self) -> None:
        """Let time pass for the attempts. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self._clock()
            self._open.end_some()
            for streams in self._registry:
                attempt = streams.attempt
                if attempt.deadline < now:
                    self._receive_and_post(streams, None)
                else:
                    self._forget_if_over(streams)

    async def process(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream to its end."""
        token, stage = _read_metadata(context) if self._gateway.opens_leg_streams else ("", "")
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
            if first is grpc.aio.EOF:
                return
            message = _parse(first)
            if not message.observability_mode:  # there a reply would be a violation
                await self._serve_attempt(message, context)
        finally:
            self._listener.attempt_closed()

    async def _serve_attempt(self, message: ProcessingRequest, context: grpc.aio.ServicerContext) -> None:
        gateway = self._gateway
        subset = read_subset_hint(message) if gateway.names_subsets else None
        peer = self._peers.of(context) if gateway.may_skip_responses else BUNDLED
        attempt = Attempt(self._environment, *read_modes(message), subset, peer)
        streams = Streams(attempt, Writer(context), self._legs, self._report_leg)
        self._registry.add(streams)
        try:
            following: ProcessingRequest | None = message
            while following is not None:
                await self._take(streams, following)
                following = None  # it may be a body of many MB, and the next message may be minutes away
                following = await self._next(streams, context)
        except ProtocolViolationError as violation:
            _log.warning("ext_proc stream ended: %s", violation)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        finally:
            self._receive_and_post(streams, on.MainClosed(keeps_leg=self._open.may_end(attempt.main)))
            if streams.hold is not None:
                streams.hold.cancel()
            if attempt.main.is_unheard:
                self._peers.report_skipped(context)
            self._forget_if_over(streams)
            merging = attempt.main.merging
            if merging is not None and merging.problem is not None:
                _log.warning("a response could not be merged with that of its prefill leg: %s", merging.problem)

    async def _take(self, streams: Streams, message: ProcessingRequest) -> None:
        """Have an attempt receive a message, and carry out what follows."""
        if (event := read_event(message, self._gateway.session_header)) is not None:
            await streams.carry_out(self._receive(streams, event), streams.main)

    async def _next(self, streams: Streams, context: grpc.aio.ServicerContext) -> ProcessingRequest | None:
        """Read the next message that is more than a piece to pass on; None at the end of the stream."""
        main = streams.attempt.main
        raw = await self._open.read(main, context)
        if main.passes_pieces and streams.main.is_idle:
            raw = await _pass_pieces(raw, context)
        return None if raw is grpc.aio.EOF else _parse(raw)

    def _receive(self, streams: Streams, event: Event | None) -> list[Command]:
        """Have an attempt receive an event, or None for the time that has passed, and follow where it gets by that."""
        attempt = streams.attempt
        commands = self._advance(attempt, event)
        if streams.hold is None and (ends_at := attempt.main.hold_ends_at) < math.inf:
            seconds = ends_at - self._clock() + _TIMER_SLACK_SECONDS
            streams.hold = asyncio.get_running_loop().call_later(seconds, self._receive_and_post, streams, None)
        if not streams.token and (token := attempt.token):
            self._registry.name(streams, token)  # before the leg can open
        if not streams.client_keys and (keys := attempt.main.aborts.client_keys):
            self._registry.name_by_client(streams, keys)
        if commands and isinstance(first := commands[0], AbortRequests):
            self.abort(first.key)
            self._announce_abort(first.key)
        if streams.waiting is not None:
            if not attempt.main.is_queued:
                streams.waiting.leave()
                streams.waiting = None
        elif self._queue is not None and attempt.main.is_queued:
            (place,) = (command for command in commands if isinstance(command, Enqueue))
            streams.waiting = Waiting(self._queue, place, partial(self._receive_and_post, streams))
        return commands

    def _receive_and_post(self, streams: Streams, event: Event | None) -> None:
        """Have an attempt receive an event that is no message which its own coroutine has to reply to."""
        streams.post(self._receive(streams, event))

    def _advance(self, attempt: Attempt, event: Event | None) -> list[Command]:
        """Advance an attempt. An unexpected error becomes an event, so that the client gets an answer."""
        now = self._clock()
        try:
            return attempt.advance(now) if event is None else attempt.receive(event, now)
        except ProtocolViolationError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the log has the cause
            error_id = uuid4().hex
            _log.exception("unexpected error %s", error_id)
            message = f"unexpected error in the router; its log has the cause under {error_id}"
            return attempt.receive(on.InternalError(message), now)

    async def _serve_leg(self, token: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream of a prefill leg. One that belongs to no attempt of this process passes."""
        leg = MirroredLeg(context)
        streams = self._registry.find(token)
        if streams is None or streams.leg is not None or not streams.attempt.leg.may_open:
            while (raw := await context.read()) is not grpc.aio.EOF:
                if (reply := PROCEED.get(type(read_leg_event(_parse(raw))))) is not None:
                    leg.put(reply)
                    await leg.flush()
            return
        streams.leg = leg
        try:
            while (raw := await context.read()) is not grpc.aio.EOF:
                if (event := read_leg_event(_parse(raw))) is not None:
                    leg.message = type(event)
                    await streams.carry_out(self._receive(streams, event), leg)
        finally:
            streams.leg = None
            self._receive_and_post(streams, on.LegClosed())
            self._forget_if_over(streams)

    def _report_leg(self, streams: Streams, event: on.LegEvent) -> None:
        """Have an attempt receive an event of the prefill leg that the service has sent for it."""
        self._receive_and_post(streams, event)
        if isinstance(event, on.LegClosed):
            streams.leg = None
            self._open.end_some()
            self._forget_if_over(streams)

    def _forget_if_over(self, streams: Streams) -> None:
        """Forget an attempt of which nothing is awaited any more."""
        if streams.leg is None and streams.attempt.is_over(self._clock()):
            self._registry.discard(streams)

    async def _serve_first_event(self, token: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream that sees a response begin.

        It is closed as soon as that is known, unless ids in the response have to be changed.
        """
        streams = self._registry.find(token)
        renames = None if streams is None else streams.attempt.first_event.renames
        renamer = None if renames is None else Renamer(renames)
        # An older configuration of Envoy sends no headers here, and a whole response keeps its length then.
        may_change = streams is not None and streams.attempt.main.streaming is True
        first = FirstEventReader()
        while (raw := await context.read()) is not grpc.aio.EOF:
            event = read_event(_parse(raw))
            if isinstance(event, on.RequestHeaders):
                await context.write(_PASS_REQUEST)
            elif isinstance(event, on.ResponseHeaders):  # sent if the request was not read, or ids are to be changed
                may_change = not event.is_encoded
                is_read = may_change and (event.is_events or renamer is not None)
                await context.write(_STREAM_BODY if is_read else _PASS_HEADERS)
                if not is_read:
                    return
            elif isinstance(event, on.ResponseBody):
                was_known = first.is_known
                first.feed(event.data, end_of_stream=event.end_of_stream)
                if streams is not None and not was_known and (found := report(first)) is not None:
                    # Before the reply, which may end the stream and this coroutine.
                    self._receive_and_post(streams, found)
                if renamer is not None and may_change:
                    renamed = renamer.feed(event.data, end_of_stream=event.end_of_stream)
                    await context.write(write_reply(Mutate(Phase.RESPONSE_BODY, body=renamed)))
                    continue
                await context.write(_PASS_BODY)
                if first.is_known:
                    return


async def _pass_pieces(raw: Any, context: grpc.aio.ServicerContext) -> Any:
    """Pass on the pieces of a response in full duplex, from the first message on.

    Nothing else writes to the stream meanwhile: once the head of a response has gone, nothing but its own messages
    causes replies.

    Returns:
        The first message that is no piece, or EOF.
    """
    while raw is not grpc.aio.EOF and (reply := pass_piece(raw)) is not None:
        await context.write(reply)
        raw = await context.read()
    return raw


_parse: Final = ProcessingRequest.FromString
_PASS_REQUEST: Final = write_reply(Continue(Phase.REQUEST_HEADERS))
_PASS_HEADERS: Final = write_reply(Continue(Phase.RESPONSE_HEADERS))
_PASS_BODY: Final = write_reply(Continue(Phase.RESPONSE_BODY))
_STREAM_BODY: Final = write_reply(StreamBody())


async def _is_set(event: asyncio.Event) -> None:
    await event.wait()


def _read_metadata(context: grpc.aio.ServicerContext) -> tuple[str, str]:
    """Read the token of the leg, and which of the attempt's streams it is; both are empty for a main stream."""
    metadata = dict(context.invocation_metadata() or ())
    return str(metadata.get(contract.LEG, "")), str(metadata.get(contract.STAGE, ""))
