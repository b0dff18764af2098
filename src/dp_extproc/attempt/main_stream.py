"""The main stream of an attempt as a state machine: the request, and the response that the client gets."""

from typing import Any, ClassVar, Final

from dp_extproc.attempt import replies
from dp_extproc.attempt.effects import Effects, Environment
from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Enqueue,
    Event,
    ExtendTimeout,
    InternalError,
    MainClosed,
    Phase,
    QueueExpired,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    RoomFreed,
    StreamBody,
    Turn,
)
from dp_extproc.attempt.failures import FAILED, Failure, failed
from dp_extproc.attempt.first_event_watch import FirstEventWatch
from dp_extproc.attempt.gateways import Headers
from dp_extproc.attempt.intake import Intake, Ready
from dp_extproc.attempt.merging import Merging
from dp_extproc.attempt.prefill_leg import PrefillLeg
from dp_extproc.attempt.transitions import MAIN, UNDECIDED, Cause, MainState, Outcome, Signal, bind
from dp_extproc.config.reliability import Supervise
from dp_extproc.engines.model import Role
from dp_extproc.load.in_flight import ERROR
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.logprobs import LegText
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Answer, Decision, Queued

_OK: Final = 200
_NO_OTHER_ATTEMPT: Final = Rejection(
    502,
    Reason.DECODE_FAILED,
    "the decode server's connection was cut before its answer had begun, and there is no other attempt",
)


class MainStream:
    """What Envoy sends on the main stream, and the replies to it."""

    __slots__ = (
        "_asks_for_body", "_effects", "_environment", "_first_event", "_holds", "_intake", "_leg", "_merges",
        "_response_mode", "body_at", "error_at", "held_at", "is_extended", "merging", "picked_at", "state", "status",
        "streaming",
    )  # fmt: skip

    def __init__(
        self,
        environment: Environment,
        effects: Effects,
        intake: Intake,
        response_mode: BodyMode,
        *,
        leg: PrefillLeg,
        first_event: FirstEventWatch,
    ) -> None:
        self._environment = environment
        self._effects = effects
        self._intake = intake
        self._response_mode = response_mode
        self._leg = leg
        self._first_event = first_event
        self._holds = leg.supervises and environment.gateway.holds_responses
        self._merges = self._asks_for_body = False
        self.state = MainState.START
        self.status = 0
        """Status of the response."""
        self.streaming: bool | None = False
        """Whether the response is a stream; None until its headers report it."""
        self.merging: Merging | None = None
        self.is_extended = False
        """Whether Envoy's patience was extended."""
        self.body_at = self.picked_at = self.held_at = self.error_at = 0.0

    @property
    def is_queued(self) -> bool:
        """Whether the request waits for room."""
        return self.state is MainState.QUEUED

    @property
    def is_routed(self) -> bool:
        """Whether the request, or the response that came without it, was let through."""
        return MainState.PASSING <= self.state < MainState.ANSWERED

    @property
    def passes_alone(self) -> bool:
        """Whether Envoy lets the rest pass as it is if the main stream ends now in good order.

        Where pieces of a body may be on their way here it would lose them.
        """
        sees_body = self._response_mode is not BodyMode.NONE or self._asks_for_body
        passes = self.state is MainState.RESPONDING or (
            not self._environment.gateway.holds_responses and self.state in {MainState.PASSING, MainState.ROUTED}
        )
        return passes and self._intake.is_complete and not sees_body

    def move(self, cause: Cause, turn: Turn, event: Any = None) -> bool:
        """Take the transition of a cause, if there is one in this state; the only place where the state is set."""
        step = self._STEPS.get((self.state, cause))
        if step is None:
            return False
        row, action = step
        self.state = row[action(self, turn, event)]
        return True

    def extend(self, turn: Turn) -> None:
        """Have Envoy wait longer than usual for the reply to the response headers."""
        self.is_extended = True
        settings = self._environment.supervision
        turn.commands.append(ExtendTimeout(settings.prefill_timeout + settings.first_token_timeout))

    # --- the request ---

    def _request_headers(self, turn: Turn, event: RequestHeaders) -> Outcome:
        intake, gateway = self._intake, self._environment.gateway
        found = intake.read_headers(event)
        earlier = intake.earlier
        if earlier.lost is not None and not self._effects.retry_lost(earlier.lost, len(earlier.failed)):
            found = _NO_OTHER_ATTEMPT if isinstance(found, Ready) else found
        if found is Ready.FOR_BODY:
            self.body_at = turn.now
            turn.commands += replies.await_body(intake.mode, intake.untrusted)
            return Outcome.AWAITS_BODY
        if isinstance(found, Ready):
            return self._schedule(turn, None)
        if isinstance(found, Rejection):
            return self._refuse(turn, found)
        if isinstance(found, Answer):
            turn.commands.append(replies.list_models(found))
            self._effects.decided("answered", turn.now)
            return Outcome.ANSWERED
        turn.commands.append(replies.route(Phase.REQUEST_HEADERS, found, gateway, untrusted=intake.untrusted))
        self._effects.decided("routed", turn.now)
        return Outcome.PASSED

    def _request_body(self, turn: Turn, event: RequestBody | RequestTrailers) -> Outcome:
        found = self._intake.read_body(event) if isinstance(event, RequestBody) else self._intake.read_trailers()
        if isinstance(found, Rejection):
            return self._refuse(turn, found)
        self.body_at = turn.now
        return self._schedule(turn, None) if found is Ready.FOR_SCHEDULING else Outcome.AWAITS_BODY

    def _body_paused(self, turn: Turn, _event: None) -> Outcome:
        return self._refuse(turn, Rejection(408, Reason.BODY_TIMEOUT, "the request body did not arrive in time"))

    def _room_freed(self, turn: Turn, event: RoomFreed) -> Outcome:
        return self._schedule(turn, event.ticket)

    def _queue_expired(self, turn: Turn, _event: QueueExpired) -> Outcome:
        queued = self._intake.queued
        assert queued is not None  # noqa: S101 - the state implies it
        return self._refuse(turn, queued.rejection)

    def _schedule(self, turn: Turn, ticket: Ticket | None) -> Outcome:
        intake = self._intake
        result = intake.schedule(ticket)
        if isinstance(result, Queued):
            if ticket is None:
                turn.commands.append(Enqueue(result.pool, result.priority))
            return Outcome.QUEUED
        if isinstance(result, Rejection):
            return self._refuse(turn, result)
        self._open(turn, result)
        turn.commands += replies.route_body(intake, result, self._environment.gateway)
        self._effects.decided("routed", turn.now)
        return Outcome.ROUTED

    def _open(self, turn: Turn, decision: Decision) -> None:
        """Follow the reservations that scheduling has opened."""
        in_flight, intake = decision.in_flight, self._intake
        assert in_flight is not None  # noqa: S101 - every inference request has reservations
        self._effects.open(in_flight, is_first=not intake.earlier.failed)
        self.picked_at = turn.now
        self.streaming = decision.streaming
        if not in_flight.leg:
            return
        if decision.merges_logprobs and intake.sees_response:
            self._leg.text = LegText()
            self.merging = Merging(self._leg.text, streaming=decision.streaming is True)
        self._leg.move(Signal.SCHEDULED, turn)
        if decision.streaming is not False and self._environment.supervision.mode is Supervise.FIRST_EVENT:
            self._first_event.move(Signal.SCHEDULED, turn, decision)

    def _pass_request(self, turn: Turn, event: RequestBody | RequestTrailers) -> Outcome:
        intake = self._intake
        intake.is_complete = intake.is_complete or isinstance(event, RequestTrailers) or event.end_of_stream
        turn.commands.append(replies.pass_request(intake.mode, event))
        return Outcome.UNCHANGED

    # --- the response ---

    def _pass_headers(self, turn: Turn, _event: ResponseHeaders) -> Outcome:
        turn.commands.append(replies.CONTINUE[Phase.RESPONSE_HEADERS])
        return Outcome.RELEASED

    def _response_headers(self, turn: Turn, event: ResponseHeaders) -> Outcome:
        status = event.status
        self._effects.first_byte(status, event.served, turn.now)
        self._first_event.move(ResponseHeaders, turn, event)
        if self.streaming is None:
            self.streaming = event.is_events
        if status >= FAILED:
            if event.end_of_stream or not self._intake.sees_response:
                return self._pass_failure(turn, Phase.RESPONSE_HEADERS, b"")
            self._asks_for_body, self.error_at, self.status = True, turn.now, status
            turn.commands.append(BufferBody(Phase.RESPONSE_HEADERS))
            return Outcome.AWAITS_ERROR
        self._merges = self.merging is not None and status == _OK
        if status < ERROR and self._holds:
            self.held_at = turn.now
            return Outcome.HELD
        self._commit(turn)
        if status >= ERROR:
            self._leg.cancel(turn)
        return Outcome.RELEASED

    def _commit(self, turn: Turn, _event: None = None) -> Outcome:
        """Let the response headers go to the client."""
        self._effects.served(Role.DECODE)
        if self._merges and self.merging is not None:
            self._asks_for_body = True
            turn.commands.append((StreamBody if self.merging.streaming else BufferBody)(Phase.RESPONSE_HEADERS))
        else:
            turn.commands.append(replies.CONTINUE[Phase.RESPONSE_HEADERS])
        return Outcome.RELEASED

    def _error_text(self, turn: Turn, event: ResponseBody) -> Outcome:
        return self._pass_failure(turn, Phase.RESPONSE_BODY, event.data)

    def _pass_failure(self, turn: Turn, phase: Phase, text: bytes) -> Outcome:
        """Let the engine's own error go on, with the retry headers if there is another attempt."""
        self._effects.blame(failed(Role.DECODE, "", text), turn.now)
        headers = self._retry_headers(Role.DECODE, Reason.DECODE_FAILED)
        holds = self._environment.gateway.holds_responses
        turn.commands.append(replies.pass_failure(phase, headers) if holds else replies.CONTINUE[phase])
        self._leg.cancel(turn)
        return Outcome.RELEASED

    def _response_piece(self, turn: Turn, event: ResponseBody | ResponseTrailers) -> Outcome:
        merging = self.merging if self._merges and self._response_mode is not BodyMode.DUPLEX else None
        if merging is None or isinstance(event, ResponseTrailers):
            turn.commands.append(replies.pass_response(self._response_mode, event))
        elif merging.awaits_text:
            merging.since = turn.now
            merging.pieces.append(event)
            return Outcome.AWAITS_TEXT
        else:
            turn.commands.append(merging.merge(event))
        return Outcome.UNCHANGED

    def _keep_piece(self, _turn: Turn, event: ResponseBody | ResponseTrailers) -> Outcome:
        assert self.merging is not None  # noqa: S101 - the state implies it
        self.merging.pieces.append(event)
        return Outcome.UNCHANGED

    def _merge_pieces(self, turn: Turn, _event: None) -> Outcome:
        assert self.merging is not None  # noqa: S101 - the state implies it
        turn.commands += self.merging.merge_pieces()
        return Outcome.RELEASED

    def _refuse(self, turn: Turn, rejection: Rejection) -> Outcome:
        turn.commands.append(replies.refuse(rejection))
        if self.state in UNDECIDED:
            self._effects.decided(rejection.reason.value, turn.now)
        return Outcome.ANSWERED

    def _internal_error(self, turn: Turn, event: InternalError) -> Outcome:
        outcome = self._refuse(turn, Rejection(500, Reason.INTERNAL_ERROR, event.message))
        self._leg.cancel(turn)
        return outcome

    def _abandon(self, turn: Turn, failure: Failure) -> Outcome:
        headers = () if failure.is_clients_fault else self._retry_headers(failure.leg, failure.reason)
        turn.commands.append(replies.answer_failure(failure, headers))
        return Outcome.ANSWERED

    def _retry_headers(self, leg: Role, reason: Reason) -> Headers:
        return self._effects.retry_headers(leg, reason, len(self._intake.earlier.failed) + 1)

    def _closed(self, turn: Turn, event: MainClosed) -> Outcome:
        self._effects.end(turn.now)
        if not event.keeps_leg:
            self._leg.cancel(turn)
        return Outcome.CLOSED

    def _ignore(self, _turn: Turn, _event: Event) -> Outcome:
        return Outcome.UNCHANGED

    _STEPS: ClassVar = bind(
        MAIN,
        {
            RequestHeaders: _request_headers,
            (MainState.BODY, RequestBody): _request_body,
            (MainState.BODY, RequestTrailers): _request_body,
            RequestBody: _pass_request,
            RequestTrailers: _pass_request,
            (MainState.ROUTED, ResponseHeaders): _response_headers,
            ResponseHeaders: _pass_headers,
            (MainState.ERROR_BODY, ResponseBody): _error_text,
            (MainState.MERGING, ResponseBody): _keep_piece,
            (MainState.MERGING, ResponseTrailers): _keep_piece,
            ResponseBody: _response_piece,
            ResponseTrailers: _response_piece,
            **dict.fromkeys(
                [key for key in MAIN if key[0] is MainState.ANSWERED and key[1] is not MainClosed], _ignore
            ),
            MainClosed: _closed,
            RoomFreed: _room_freed,
            QueueExpired: _queue_expired,
            InternalError: _internal_error,
            Signal.ADVANCE: _body_paused,
            Signal.COMMIT: _commit,
            Signal.ABANDON: _abandon,
            Signal.TEXT_COMPLETE: _merge_pieces,
        },
    )
