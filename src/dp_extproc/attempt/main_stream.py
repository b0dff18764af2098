"""The main stream of an attempt as a state machine: the request, and the response that the client gets."""

from typing import ClassVar, Final

from dp_extproc.attempt import events as on
from dp_extproc.attempt import replies
from dp_extproc.attempt.effects import Effects, Environment
from dp_extproc.attempt.events import BodyMode, BufferBody, Enqueue, Event, ExtendTimeout, Phase, StreamBody
from dp_extproc.attempt.failures import ENGINE_FAILED, Failure, failed
from dp_extproc.attempt.first_event_watch import FirstEventWatch
from dp_extproc.attempt.gateways import Headers
from dp_extproc.attempt.intake import Intake, Need
from dp_extproc.attempt.machine import Machine, Turn, bind
from dp_extproc.attempt.merging import Merging
from dp_extproc.attempt.prefill_leg import PrefillLeg
from dp_extproc.attempt.transitions import MAIN, UNDECIDED, MainState, Outcome, Signal
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


class MainStream(Machine[MainState]):
    """What Envoy sends on the main stream, and the replies to it."""

    __slots__ = (
        "_asks_for_body", "_effects", "_environment", "_first_event", "_holds", "_intake", "_leg", "_response_mode",
        "body_at", "error_at", "held_at", "is_extended", "merging", "picked_at", "status", "streaming",
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
        super().__init__(MainState.START)
        self._environment = environment
        self._effects = effects
        self._intake = intake
        self._response_mode = response_mode
        self._leg = leg
        self._first_event = first_event
        self._holds = leg.is_supervised and environment.gateway.holds_responses
        self._asks_for_body = False
        """Whether Envoy was asked to send the response body here."""
        self.status = 0
        """Status of the response."""
        self.streaming: bool | None = False
        """Whether the response is a stream; None until its headers report it."""
        self.merging: Merging | None = None
        self.is_extended = False
        """Whether Envoy's patience was extended."""
        self.body_at = self.picked_at = self.held_at = self.error_at = 0.0
        """Times of the last piece of the request, the pick, and the response headers that are held or of an error."""

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

    @property
    def passes_pieces(self) -> bool:
        """Whether each piece of the response is only passed on, and changes nothing here."""
        return self.state is MainState.RESPONDING and self._response_mode is BodyMode.DUPLEX

    def extend(self, turn: Turn) -> None:
        """Have Envoy wait longer than usual for the reply to the response headers."""
        self.is_extended = True
        settings = self._environment.supervision
        turn.commands.append(ExtendTimeout(settings.prefill_timeout + settings.first_token_timeout))

    # --- the request ---

    def _request_headers(self, turn: Turn, event: on.RequestHeaders) -> Outcome:
        intake, gateway = self._intake, self._environment.gateway
        found = intake.read_headers(event)
        earlier = intake.earlier
        if earlier.lost is not None and not self._effects.attempt_lost(earlier.lost, len(earlier.failed)):
            found = _NO_OTHER_ATTEMPT if isinstance(found, Need) else found
        if found is Need.BODY:
            self.body_at = turn.now
            turn.commands += replies.await_body(intake.mode, intake.untrusted)
            return Outcome.AWAITS_BODY
        if isinstance(found, Need):
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

    def _request_body(self, turn: Turn, event: on.RequestBody | on.RequestTrailers) -> Outcome:
        found = self._intake.read_body(event) if isinstance(event, on.RequestBody) else self._intake.read_trailers()
        if isinstance(found, Rejection):
            return self._refuse(turn, found)
        self.body_at = turn.now
        return self._schedule(turn, None) if found is Need.SCHEDULING else Outcome.AWAITS_BODY

    def _body_paused(self, turn: Turn, _event: None) -> Outcome:
        return self._refuse(turn, Rejection(408, Reason.BODY_TIMEOUT, "the request body did not arrive in time"))

    def _room_freed(self, turn: Turn, event: on.RoomFreed) -> Outcome:
        return self._schedule(turn, event.ticket)

    def _queue_expired(self, turn: Turn, _event: on.QueueExpired) -> Outcome:
        queued = self._intake.queued
        assert queued is not None  # noqa: S101 - the state implies it
        return self._refuse(turn, queued.rejection)

    def _schedule(self, turn: Turn, ticket: Ticket | None) -> Outcome:
        intake = self._intake
        result = intake.schedule(ticket)
        if isinstance(result, Queued):
            if ticket is None:
                turn.commands.append(Enqueue(result.pool, result.priority, result.work))
            return Outcome.QUEUED
        if isinstance(result, Rejection):
            return self._refuse(turn, result)
        self._follow(turn, result)
        turn.commands += replies.route_body(intake, result, self._environment.gateway)
        self._effects.decided("routed", turn.now)
        return Outcome.ROUTED

    def _follow(self, turn: Turn, decision: Decision) -> None:
        """Follow the reservations that scheduling has opened."""
        in_flight, intake = decision.in_flight, self._intake
        assert in_flight is not None  # noqa: S101 - every inference request has reservations
        self._effects.follow(in_flight, is_first=not intake.earlier.failed)
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

    def _pass_request(self, turn: Turn, event: on.RequestBody | on.RequestTrailers) -> Outcome:
        intake = self._intake
        intake.is_complete = intake.is_complete or isinstance(event, on.RequestTrailers) or event.end_of_stream
        turn.commands.append(replies.pass_on(intake.mode, event))
        return Outcome.UNCHANGED

    # --- the response ---

    def _pass_headers(self, turn: Turn, _event: on.ResponseHeaders) -> Outcome:
        turn.commands.append(replies.CONTINUE[Phase.RESPONSE_HEADERS])
        return Outcome.RELEASED

    def _response_headers(self, turn: Turn, event: on.ResponseHeaders) -> Outcome:
        status = event.status
        self._effects.first_byte(status, event.served, turn.now)
        self._first_event.move(on.ResponseHeaders, turn, event)
        if self.streaming is None:
            self.streaming = event.is_events
        if status != _OK:
            self.merging = None  # an error has no log probabilities
        if status >= ENGINE_FAILED:
            if event.end_of_stream or not self._intake.sees_response:
                return self._pass_failure(turn, Phase.RESPONSE_HEADERS, b"")
            self._asks_for_body, self.error_at, self.status = True, turn.now, status
            turn.commands.append(BufferBody())
            return Outcome.AWAITS_ERROR
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
        if self.merging is not None:
            self._asks_for_body = True
            turn.commands.append(StreamBody() if self.merging.streaming else BufferBody())
        else:
            turn.commands.append(replies.CONTINUE[Phase.RESPONSE_HEADERS])
        return Outcome.RELEASED

    def _error_text(self, turn: Turn, event: on.ResponseBody) -> Outcome:
        return self._pass_failure(turn, Phase.RESPONSE_BODY, event.data)

    def _pass_failure(self, turn: Turn, phase: Phase, text: bytes) -> Outcome:
        """Let the engine's own error go on, with the retry headers if there is another attempt."""
        self._effects.blame(failed(Role.DECODE, "", text), turn.now)
        headers = self._retry_headers(Role.DECODE, Reason.DECODE_FAILED)
        holds = self._environment.gateway.holds_responses
        turn.commands.append(replies.pass_failure(phase, headers) if holds else replies.CONTINUE[phase])
        self._leg.cancel(turn)
        return Outcome.RELEASED

    def _response_piece(self, turn: Turn, event: on.ResponseBody | on.ResponseTrailers) -> Outcome:
        merging = self.merging if self._response_mode is not BodyMode.DUPLEX else None
        if merging is None or isinstance(event, on.ResponseTrailers):
            turn.commands.append(replies.pass_on(self._response_mode, event))
        elif merging.awaits_text:
            merging.since = turn.now
            merging.pieces.append(event)
            return Outcome.AWAITS_TEXT
        else:
            turn.commands.append(merging.merge(event))
        return Outcome.UNCHANGED

    def _keep_piece(self, _turn: Turn, event: on.ResponseBody | on.ResponseTrailers) -> Outcome:
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

    def _internal_error(self, turn: Turn, event: on.InternalError) -> Outcome:
        outcome = self._refuse(turn, Rejection(500, Reason.INTERNAL_ERROR, event.message))
        self._leg.cancel(turn)
        return outcome

    def _abandon(self, turn: Turn, failure: Failure) -> Outcome:
        headers = () if failure.is_clients_fault else self._retry_headers(failure.leg, failure.reason)
        turn.commands.append(replies.answer_failure(failure, headers))
        return Outcome.ANSWERED

    def _retry_headers(self, leg: Role, reason: Reason) -> Headers:
        return self._effects.retry_headers(leg, reason, len(self._intake.earlier.failed) + 1)

    def _closed(self, turn: Turn, event: on.MainClosed) -> Outcome:
        self._effects.end(turn.now)
        if not event.keeps_leg:
            self._leg.cancel(turn)
        return Outcome.CLOSED

    def _ignore(self, _turn: Turn, _event: Event) -> Outcome:
        return Outcome.UNCHANGED

    _STEPS: ClassVar = bind(
        MAIN,
        {
            on.RequestHeaders: _request_headers,
            (MainState.BODY, on.RequestBody): _request_body,
            (MainState.BODY, on.RequestTrailers): _request_body,
            on.RequestBody: _pass_request,
            on.RequestTrailers: _pass_request,
            (MainState.ROUTED, on.ResponseHeaders): _response_headers,
            on.ResponseHeaders: _pass_headers,
            (MainState.ERROR_BODY, on.ResponseBody): _error_text,
            (MainState.MERGING, on.ResponseBody): _keep_piece,
            (MainState.MERGING, on.ResponseTrailers): _keep_piece,
            on.ResponseBody: _response_piece,
            on.ResponseTrailers: _response_piece,
            **dict.fromkeys([key for key in MAIN if key[0] is MainState.ANSWERED], _ignore),
            (MainState.ANSWERED, on.MainClosed): _closed,
            on.MainClosed: _closed,
            on.RoomFreed: _room_freed,
            on.QueueExpired: _queue_expired,
            on.InternalError: _internal_error,
            Signal.ADVANCE: _body_paused,
            Signal.COMMIT: _commit,
            Signal.ABANDON: _abandon,
            Signal.TEXT_COMPLETE: _merge_pieces,
        },
    )
