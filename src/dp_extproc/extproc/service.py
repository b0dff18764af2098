"""The gRPC side of ext_proc: one coroutine per stream, which moves messages between gRPC and the state machines."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol
from uuid import uuid4

import grpc
import grpc.aio
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from google.protobuf.message import DecodeError

from dp_extproc import contract
from dp_extproc.attempt.decider import Decider
from dp_extproc.attempt.events import (
    BodyMode,
    Continue,
    Event,
    Phase,
    Reply,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    StreamBody,
)
from dp_extproc.config.reliability import RetrySettings, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.codec import read_event, read_modes, read_subset_hint, write_reply
from dp_extproc.extproc.exchange import Exchange, ProtocolViolationError
from dp_extproc.extproc.leaving import OpenStreams
from dp_extproc.extproc.link import Link, Writer
from dp_extproc.extproc.retries import RetryBudget
from dp_extproc.extproc.supervision import Say, Stream, Supervision, SupervisionObserver
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.rejection import Reason
from dp_extproc.response.first_event import FirstEvent
from dp_extproc.scheduling.admission import AdmissionQueue

SERVICE_NAME: Final = "envoy.service.ext_proc.v3.ExternalProcessor"

HOLD_SECONDS: Final = 60.0
"""How long a duplex body may pause while it is being held. Envoy has no timeout of its own in this mode."""
SWEEP_SECONDS: Final = 0.25
"""How often attempts are looked at that may take too long."""
_LATE_LEG_SECONDS: Final = 10.0
"""How long after its attempt a prefill leg may still show up, and be ended."""

_SUPERVISION: Final = SupervisionSettings()

_log = logging.getLogger(__name__)


class StreamObserver(SupervisionObserver, Protocol):
    """Told of every stream; for metrics."""

    def stream_opened(self) -> None: ...
    def stream_closed(self) -> None: ...
    def served_elsewhere(self) -> None:
        """A gateway has sent a request to another endpoint than the picked one."""
        ...

    def decided(self, exchange: Exchange, seconds: float) -> None:
        """A request was placed, answered or refused, in so many seconds of work."""
        ...


class ExtProcService:
    """Serves ext_proc streams: those of requests, those of prefill legs, and those that see first events."""

    def __init__(
        self,
        decider: Decider,
        observer: StreamObserver,
        *,
        supervision: SupervisionSettings = _SUPERVISION,
        budget: RetryBudget | None = None,
        queue: AdmissionQueue | None = None,
        max_body: int,
        clock: Callable[[], float],
        hold_seconds: float = HOLD_SECONDS,
        picks: bool = False,
        session_header: str | None = None,
    ) -> None:
        """Set up.

        Args:
            decider: Who places requests.
            observer: Told of everything.
            supervision: How far legs are watched.
            budget: Of retries; None for one of the usual size.
            queue: Where requests wait for room; None refuses them at once.
            max_body: Bytes of a request.
            clock: Monotonic seconds; the same that the books are kept with.
            hold_seconds: How long a body may pause.
            picks: Whether to speak the endpoint-picker protocol.
            session_header: The clients' header that names a conversation, for that protocol; our own Envoy copies it.
        """
        self._decider = decider
        self._observer = observer
        self._supervision = supervision
        self._budget = budget or RetryBudget(RetrySettings())
        self._queue = queue
        self._max_body = max_body
        self._clock = clock
        self._hold_seconds = hold_seconds
        self._picks = picks
        self._session_header = session_header if picks else contract.SESSION
        self._open = OpenStreams()
        self._links: dict[str | InFlight, Link] = {}
        """Attempts by the token of their leg, as long as a stream of theirs may come or stay; see :func:`_key`."""

    def handler(self) -> grpc.GenericRpcHandler:
        """Make what a server registers. Answers are serialised already, most of them once and for all."""
        process = grpc.stream_stream_rpc_method_handler(self.process, ProcessingRequest.FromString, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})

    async def leave(self) -> None:
        """End the streams that Envoy can do without, before it sees the others break: the process is about to end."""
        await self._open.leave()

    async def sweep(self) -> None:
        """Look after the attempts that take long. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self._clock()
            self._open.end_some()
            for leg, link in list(self._links.items()):
                supervision = link.supervision
                if supervision.is_over and now - supervision.over_at > _LATE_LEG_SECONDS:
                    del self._links[leg]
                elif said := supervision.sweep(now):
                    await link.carry_out(said)

    async def process(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        """Serve one stream to its end."""
        try:
            await self._serve(context)
        except DecodeError as error:
            _log.warning("ext_proc stream ended: a message cannot be read: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a message cannot be read")

    async def _serve(self, context: grpc.aio.ServicerContext) -> None:
        leg, stage = ("", "") if self._picks else _address_of(context)  # only our own Envoy opens more than one
        if stage:
            await self._watch_first_event(leg, context)
        elif leg:
            await self._watch_leg(leg, context)
        else:
            self._observer.stream_opened()
            try:
                first = await context.read()
                if first is not grpc.aio.EOF and not first.observability_mode:  # there an answer would be a violation
                    await self._exchange(first, context)
            finally:
                self._observer.stream_closed()

    async def _exchange(self, message: Any, context: grpc.aio.ServicerContext) -> None:
        mode, response_mode = read_modes(message)
        exchange = Exchange(
            self._decider,
            mode,
            self._max_body,
            response_mode=response_mode,
            holds=not self._picks,  # a gateway of others neither repeats requests nor lets its answers be exchanged
            picks=self._picks,
            session_header=self._session_header,
            subset=read_subset_hint(message) if self._picks else None,
        )
        writer = Writer(context)
        link: Link | None = None
        try:
            while message is not grpc.aio.EOF:
                event = read_event(message, self._session_header)
                if event is not None:
                    replies = await self._take(exchange, link, event)
                    if link is None and exchange.attempt is not None:
                        link = self._watch(exchange, exchange.attempt, writer)  # before its legs can show up
                    if link is None:
                        await writer.write(replies)
                    else:
                        # Noted before anything is written: Envoy may cancel the stream once the client has its answer.
                        said = self._answered(exchange, link.supervision, event)
                        await link.carry_out([*((Stream.MAIN, reply) for reply in replies), *said], Stream.MAIN)
                is_held = mode is BodyMode.DUPLEX and exchange.is_holding
                message = await (self._read_held if is_held else self._open.read)(exchange, context)
        except ProtocolViolationError as violation:
            _log.warning("ext_proc stream ended: %s", violation)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        finally:
            if (attempt := exchange.attempt) is not None:
                attempt.end(self._clock())
            if link is not None and not self._open.may_end(exchange):
                await self._close(link)
            if exchange.merge_problem is not None:
                _log.warning("log probabilities of a prompt were left out: %s", exchange.merge_problem)

    async def _take(self, exchange: Exchange, link: Link | None, event: Event) -> tuple[Reply, ...]:
        """Have the exchange take an event in, and wait for what it needs with it: prefill's words, or room."""
        if link is not None and exchange.awaits_prefill_text and isinstance(event, ResponseBody):
            exchange.merge_with(await link.prefill_text.wait())
        replies = self._advance(exchange, event, exchange.receive)
        if exchange.cut is not None and isinstance(event, RequestHeaders):
            replies = self._note_cut(exchange, exchange.cut, event) or replies
        return await self._wait_for_room(exchange, event) if exchange.is_waiting else replies

    def _advance(
        self, exchange: Exchange, event: Event, step: Callable[[Event], tuple[Reply, ...]]
    ) -> tuple[Reply, ...]:
        """Have the exchange take a step, and tell the observer what came of it."""
        undecided = not exchange.is_decided
        began = self._clock()
        try:
            replies = step(event)
        except ProtocolViolationError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the cause
            error_id = uuid4().hex
            _log.exception("unexpected error %s", error_id)
            replies = exchange.fail(f"unexpected error in the router; its log has the cause under {error_id}")
        if undecided and exchange.is_decided and not isinstance(event, ResponseHeaders):
            self._observer.decided(exchange, self._clock() - began)
        return replies

    def _note_cut(self, exchange: Exchange, address: str, event: Event) -> tuple[Reply, ...]:
        """Count what Envoy has repeated by itself, and refuse the repetition if it cannot be afforded."""
        self._decider.lost(address)
        retried = self._budget.spend(len(exchange.failed))
        self._observer.leg_failed(Role.DECODE, Reason.DECODE_FAILED, retried=retried)
        return () if retried else self._advance(exchange, event, lambda _: exchange.refuse_another_attempt())

    async def _wait_for_room(self, exchange: Exchange, event: Event) -> tuple[Reply, ...]:
        """Keep a request in the admission queue until it is placed, or has waited too long."""
        queue, queued = self._queue, exchange.queued
        assert queue is not None and queued is not None  # noqa: S101, PT018 - else it would not wait
        turn = asyncio.Event()
        ticket = queue.enqueue(queued.pool, queued.priority, turn.set)
        if ticket is None:
            return self._advance(exchange, event, lambda _: exchange.give_up())
        try:
            async with asyncio.timeout(queue.settings.max_wait):
                while True:
                    await turn.wait()
                    turn.clear()
                    replies = self._advance(exchange, event, lambda _: exchange.decide_again(ticket))
                    if not exchange.is_waiting:
                        return replies
        except TimeoutError:
            return self._advance(exchange, event, lambda _: exchange.give_up())
        finally:
            queue.remove(ticket)

    def _watch(self, exchange: Exchange, attempt: InFlight, writer: Writer) -> Link:
        """Begin to watch an attempt."""
        if not exchange.failed:
            self._budget.earn()
        supervision = Supervision(
            exchange,
            attempt,
            self._supervision,
            self._budget,
            self._observer,
            streaming=False if exchange.decision is None else exchange.decision.streaming,
            sees_text=exchange.merges,
            earlier=len(exchange.failed),
            now=self._clock(),
        )
        link = self._links[_key(attempt)] = Link(supervision, writer)
        return link

    def _answered(self, exchange: Exchange, supervision: Supervision, event: Event) -> list[Say]:
        """Tell the books and the supervision what the answering server says: its head, and the text of an error."""
        now = self._clock()
        if isinstance(event, ResponseBody) and not exchange.is_responding:
            return supervision.decode_explained(event.data, now)
        if not isinstance(event, ResponseHeaders):
            return []
        supervision.attempt.first_byte(event.status, now)
        host = supervision.attempt.decode_endpoint
        if event.served is not None and host is not None and event.served != host.address:
            self._observer.served_elsewhere()
        has_body = not event.end_of_stream
        return supervision.decode_answered(event.status, now, has_body=has_body, is_events=event.is_events)

    async def _close(self, link: Link) -> None:
        supervision = link.supervision
        said = supervision.closed(self._clock())
        if not supervision.awaits_prefill:
            self._links.pop(_key(supervision.attempt), None)
        await link.carry_out(said)

    async def _read_held(self, exchange: Exchange, context: grpc.aio.ServicerContext) -> Any:
        """Read the next message of a body that is being held, but do not wait for ever."""
        try:
            async with asyncio.timeout(self._hold_seconds):
                return await context.read()
        except TimeoutError:
            for reply in exchange.expire():
                await context.write(write_reply(reply))
            return grpc.aio.EOF

    async def _watch_leg(self, leg: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream of a prefill leg. One that belongs to no attempt of this process is let through."""
        writer = Writer(context)
        link = self._links.get(leg)
        if link is not None:
            link.opened(writer)
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                event = read_event(message)
                if link is None:
                    await writer.write(_GO_ON.get(type(event), ()))
                else:
                    if isinstance(event, ResponseBody):
                        link.prefill_text.take(event.data, end_of_stream=event.end_of_stream)
                    await link.carry_out(self._leg_says(link.supervision, event), Stream.PREFILL)
        finally:
            if link is not None:
                link.prefill_text.close()
                said = link.supervision.prefill_closed(self._clock())
                if link.supervision.is_over:
                    self._links.pop(leg, None)
                await link.carry_out(said)

    def _leg_says(self, supervision: Supervision, event: Event | None) -> list[Say]:
        if isinstance(event, RequestHeaders):
            return supervision.prefill_opened()
        if isinstance(event, ResponseHeaders):
            return supervision.prefill_answered(
                event.status, self._clock(), has_body=not event.end_of_stream, is_events=event.is_events
            )
        if isinstance(event, ResponseBody):
            return supervision.prefill_explained(event.data, self._clock(), end_of_stream=event.end_of_stream)
        return []

    async def _watch_first_event(self, leg: str, context: grpc.aio.ServicerContext) -> None:
        """Serve the stream that sees an answer's beginning; it is closed as soon as that is known."""
        link = self._links.get(leg)
        first = FirstEvent()
        while (message := await context.read()) is not grpc.aio.EOF:
            event = read_event(message)
            if isinstance(event, ResponseHeaders):  # shown only where nobody knows yet whether it is a stream
                await context.write(_SEE if event.is_events else _GO_ON_HEAD)
                if not event.is_events:
                    return
                continue
            if not isinstance(event, ResponseBody):
                for reply in _GO_ON.get(type(event), ()):
                    await context.write(write_reply(reply))
                continue
            first.feed(event.data, end_of_stream=event.end_of_stream)
            is_done = first.is_known or event.end_of_stream
            if is_done and link is not None:  # before the reply: with that Envoy may end the stream, and this coroutine
                await link.carry_out(link.supervision.first_event(first.error, self._clock()))
            await context.write(_GO_ON_BODY)
            if is_done:
                return


_GO_ON_BODY: Final = write_reply(Continue(Phase.RESPONSE_BODY))
_GO_ON_HEAD: Final = write_reply(Continue(Phase.RESPONSE_HEADERS))
_SEE: Final = write_reply(StreamBody(Phase.RESPONSE_HEADERS))
_GO_ON: Final[dict[type, tuple[Reply, ...]]] = {
    RequestHeaders: (Continue(Phase.REQUEST_HEADERS),),
    ResponseHeaders: (Continue(Phase.RESPONSE_HEADERS),),
    ResponseBody: (Continue(Phase.RESPONSE_BODY),),
}
"""What a leg is told that nobody knows here."""


def _key(attempt: InFlight) -> str | InFlight:
    """Give the key of an attempt: the token of its leg; without a leg itself, which no stream can name."""
    return attempt.leg or attempt


def _address_of(context: grpc.aio.ServicerContext) -> tuple[str, str]:
    """Read which attempt a stream belongs to, and which of its streams it is; both empty for a request's own."""
    leg = stage = ""
    for name, value in context.invocation_metadata() or ():
        if name == contract.LEG:
            leg = str(value)
        elif name == contract.STAGE:
            stage = str(value)
    return leg, stage
