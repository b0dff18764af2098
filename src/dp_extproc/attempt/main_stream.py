"""The main stream of an attempt as a state machine: the request, and the response that the client gets."""

import math
from typing import ClassVar, Final

from dp_extproc.attempt import events as on
from dp_extproc.attempt import replies
from dp_extproc.attempt.effects import Effects, Environment
from dp_extproc.attempt.error_text import ErrorText
from dp_extproc.attempt.events import BodyMode, Event, Phase
from dp_extproc.attempt.failures import ABORTED, ENGINE_FAILED, NO_OTHER_ATTEMPT, Failure, engine_error
from dp_extproc.attempt.first_event_watch import FirstEventWatch
from dp_extproc.attempt.gateways import Headers, Peer
from dp_extproc.attempt.held_response import HeldResponse
from dp_extproc.attempt.intake import Intake, Need
from dp_extproc.attempt.leg_aborts import LegAborts
from dp_extproc.attempt.machine import Machine, Turn, bind
from dp_extproc.attempt.merging import COMPRESSED, Merging
from dp_extproc.attempt.prefill_leg import PrefillLeg
from dp_extproc.attempt.transitions import GOOD, MAIN, UNDECIDED, MainState, Outcome, Signal
from dp_extproc.config.reliability import Supervise
from dp_extproc.engines.model import Role
from dp_extproc.load.in_flight import ERROR
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Answer, Decision, Queued

_OK: Final = 200


class MainStream(Machine[MainState]):
    """What Envoy sends on the main stream, and the replies to it."""

    __slots__ = (
        "_asks_for_body", "_effects", "_environment", "_error", "_first_event", "_intake", "_leg", "_peer",
        "_response_mode", "aborts", "body_at", "error_at", "held", "is_extended", "is_unheard", "merging", "picked_at",
        "status", "streaming",
    )  # fmt: skip

    def __init__(
        self,
        environment: Environment,
        effects: Effects,
        intake: Intake,
        response_mode: BodyMode,
        peer: Peer,
        *,
        leg: PrefillLeg,
        first_event: FirstEventWatch,
    ) -> None:
        super().__init__(MainState.START)
        self._environment = environment
        self._effects = effects
        self._intake = intake
        self._response_mode = response_mode
        self._peer = peer
        self._leg = leg
        self._first_event = first_event
        self.held = HeldResponse(environment.gateway.longest_hold(response_mode) if leg.is_supervised else 0.0)
        self.aborts = LegAborts(intake)
        self._asks_for_body = False
        """Whether Envoy was asked to send the response body here."""
        self._error: ErrorText  # once the headers of one have come
        self.status = 0
        """Status of the response."""
        self.streaming: bool | None = False
        """Whether the response is a stream; None until its headers report it."""
        self.merging: Merging | None = None
        self.is_extended = not environment.gateway.sends_bodies_on_request
        """Whether Envoy's patience was extended, or cannot be."""
        self.is_unheard = False
        """Whether the stream has ended before the response, and reservations end when the prefill leg has."""
        self.body_at = self.picked_at = self.error_at = 0.0
        """Times of the last piece of the request, the pick, and the response headers of an error."""

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
            self._environment.gateway.may_skip_responses
            and self.state in {MainState.PASSING, MainState.ROUTED}
            and not self._leg.runs_here
        )
        return passes and self._intake.is_complete and not sees_body

    @property
    def hears_response(self) -> bool:
        """Whether the gateway sends response headers here, as far as it has been seen to."""
        return self._peer.sends_responses

    @property
    def hold_ends_at(self) -> float:
        """The moment at which response headers that are held go to the client, whatever is still awaited."""
        return self.held.since + self.held.longest if self.state is MainState.HELD else math.inf

    @property
    def passes_pieces(self) -> bool:
        """Whether each piece of the response is only passed on, and changes nothing here."""
        return self.state is MainState.RESPONDING and self._response_mode is BodyMode.DUPLEX

    def extend(self, turn: Turn) -> None:
        """Have Envoy wait longer than usual for the reply to the response headers."""
        self.is_extended = True
        settings = self._environment.supervision
        turn.commands.append(on.ExtendTimeout(settings.prefill_timeout + settings.first_token_timeout))

    # --- the request ---

    def _request_headers(self, turn: Turn, event: on.RequestHeaders) -> Outcome:
        intake, gateway = self._intake, self._environment.gateway
        found = intake.read_headers(event)
        earlier = intake.earlier
        if earlier.lost is not None and not self._effects.attempt_lost(earlier.lost, len(earlier.failed)):
            found = NO_OTHER_ATTEMPT if isinstance(found, Need) else found
        if found is Need.BODY:
            self.body_at = turn.now
            turn.commands += replies.await_body(intake.mode, intake.untrusted)
            return Outcome.AWAITS_BODY
        if isinstance(found, Need):
            return self._schedule(turn, None)
        if isinstance(found, Rejection):
            return self._refuse(turn, found)
        if isinstance(found, Answer):
            turn.commands.append(replies.answer(found))
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
        return self._refuse(turn, Rejection(408, Reason.BODY_TIMEOUT, "the request body paused; send it again"))

    def _room_freed(self, turn: Turn, event: on.RoomFreed) -> Outcome:
        return self._schedule(turn, event.ticket)

    def _queue_expired(self, turn: Turn, _event: on.QueueExpired) -> Outcome:
        queued = self._intake.queued
        assert queued is not None  # noqa: S101 - the state implies it
        return self._refuse(turn, queued.rejection)

    def _abort_wanted(self, turn: Turn, event: on.AbortWanted) -> Outcome:
        if not self.is_queued:
            self.aborts.end_prompts(turn, event.prompts)
            return Outcome.UNCHANGED
        if len(event.prompts) < self._intake.prompts:
            return Outcome.UNCHANGED  # a batch waits as a whole
        return self._refuse(turn, Rejection(ABORTED.status, ABORTED.reason, ABORTED.message))

    def _schedule(self, turn: Turn, ticket: Ticket | None) -> Outcome:
        intake = self._intake
        result = intake.schedule(ticket)
        if isinstance(result, on.AbortRequests):
            turn.commands += (result, replies.ABORTS_SENT)
            self._effects.decided("answered", turn.now)
            return Outcome.ANSWERED
        if isinstance(result, Queued):
            if ticket is None:
                turn.commands.append(on.Enqueue(result.pool, result.priority, result.work))
            return Outcome.QUEUED
        if isinstance(result, Rejection):
            return self._refuse(turn, result)
        if result.in_flight is None:  # any engine can answer it
            turn.commands += replies.route_body(intake, result, self._environment.gateway)
            self._effects.decided("routed", turn.now)
            return Outcome.PASSED
        self._follow(turn, result)
        if result.prefill is not None:  # first, so that it does not wait for the reply to be written
            turn.commands.append(on.SendLeg(result.prefill, intake.path, intake.passed))
        self.aborts.follow(result, intake.passed)
        turn.commands += replies.route_body(intake, result, self._environment.gateway)
        self._effects.decided("routed", turn.now)
        return Outcome.ROUTED

    def _follow(self, turn: Turn, decision: Decision) -> None:
        """Follow the reservations that scheduling has opened."""
        in_flight, intake = decision.in_flight, self._intake
        assert in_flight is not None  # noqa: S101 - every inference request has reservations
        self._effects.follow(in_flight, decision.fingerprint, intake.earlier)
        self.picked_at = turn.now
        self.streaming = decision.streaming
        if not in_flight.leg:
            return
        if decision.merges is not None and intake.sees_response:
            self.merging = Merging(decision.merges, streaming=decision.streaming is True, errors=intake.errors)
            self._leg.text = self.merging.text
        self._leg.move(Signal.SCHEDULED, turn, decision)
        self._first_event.renames = decision.renames
        wants_event = self._environment.supervision.mode is Supervise.FIRST_EVENT and decision.streaming is not False
        if wants_event and self._environment.gateway.shows_first_events(self._response_mode):
            self._first_event.move(Signal.SCHEDULED, turn, decision)

    def _pass_request(self, turn: Turn, event: on.RequestBody | on.RequestTrailers) -> Outcome:
        intake = self._intake
        intake.is_complete = intake.is_complete or isinstance(event, on.RequestTrailers) or event.end_of_stream
        turn.commands.append(replies.pass_on(intake.mode, event))
        return Outcome.UNCHANGED

    # --- the response ---

    def _pass_headers(self, turn: Turn, _event: on.ResponseHeaders | None) -> Outcome:
        skips = self._response_mode in replies.SKIPPED and not self._environment.gateway.sends_bodies_on_request
        turn.commands.append(on.SkipBody() if skips else replies.CONTINUE[Phase.RESPONSE_HEADERS])
        return Outcome.RELEASED

    def _response_headers(self, turn: Turn, event: on.ResponseHeaders) -> Outcome:
        status = self.status = event.status
        self._peer.sends_responses = True
        self._effects.first_byte(status, event.served, turn.now)
        self._first_event.move(on.ResponseHeaders, turn, event)
        if self.streaming is None:
            self.streaming = event.is_events
        if status != _OK:
            self.merging = None  # an error has nothing of the prompt
        if status >= ERROR:
            return self._error_headers(turn, event)
        if event.is_encoded and self.merging is not None:
            turn.failure = COMPRESSED
            return Outcome.HELD
        if self.held.longest:
            self.held.since = turn.now
            return Outcome.HELD
        return self._commit(turn)

    def _error_headers(self, turn: Turn, event: on.ResponseHeaders) -> Outcome:
        """Hold the headers of an error until its text has come, or pass it on where no text comes here."""
        renames, is_sent = self._first_event.renames, self._intake.sees_response
        error = self._error = ErrorText(event, self._response_mode, is_sent=is_sent, renames=renames)
        if error.is_readable:
            self._asks_for_body, self.error_at = True, turn.now
            turn.commands += error.ask()
        elif self.status >= ENGINE_FAILED:
            return self._pass_failure(turn, error)
        else:
            self._commit(turn)
        if self.status < ENGINE_FAILED:
            self._leg.cancel(turn)
        return Outcome.AWAITS_ERROR if error.is_readable else Outcome.RELEASED

    def _commit_held(self, turn: Turn, _event: None) -> Outcome:
        """Let the response go to the client, as far as it was held."""
        if turn.now > self.held.since:
            self._effects.held(turn.now - self.held.since, in_vain=self._leg.state not in GOOD)
        self._commit(turn)
        turn.commands += self.held.release(self._response_mode)
        return Outcome.RELEASED

    def _held_piece(self, turn: Turn, event: on.ResponseBody | on.ResponseTrailers) -> Outcome:
        """Keep a piece of the response behind its headers, and read its first event."""
        self.held.keep(event)
        data, end_of_stream = (event.data, event.end_of_stream) if isinstance(event, on.ResponseBody) else (b"", True)
        self._first_event.feed(turn, data, end_of_stream=end_of_stream)
        return self._commit_held(turn, None) if self.held.is_full else Outcome.UNCHANGED

    def _commit(self, turn: Turn) -> Outcome:
        """Let the response headers go to the client."""
        self._effects.served(Role.DECODE)
        if self.merging is not None:
            self._asks_for_body = True
            turn.commands.append(self.merging.ask())
            return Outcome.RELEASED
        return self._pass_headers(turn, None)

    def _error_text(self, turn: Turn, event: on.ResponseBody | on.ResponseTrailers) -> Outcome:
        return self._pass_failure(turn, self._error) if self._error.take(event) else Outcome.UNCHANGED

    def _pass_failure(self, turn: Turn, error: ErrorText) -> Outcome:
        """Let the engine's own error go on, with the retry headers if there is another attempt."""
        failure = engine_error(Role.DECODE, self.status, error.text, "", is_lost=error.is_loss)
        changes: tuple[Headers, tuple[str, ...]] = (), ()
        if failure.is_clients_fault:
            self._effects.served(Role.DECODE)
        elif self.aborts.are_wanted:
            changes = (), replies.RETRY_HEADERS
        else:
            retry = self._retry_headers(failure)
            self._effects.blame(failure, turn.now)
            if self._environment.gateway.repeats_requests:
                changes = retry, replies.RETRY_HEADERS
        turn.commands += error.pass_on(*changes, self._intake.errors)
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
        turn.commands.append(replies.refuse(rejection, self._intake.errors))
        if self.state in UNDECIDED:
            self._effects.decided(rejection.reason.value, turn.now)
        return Outcome.ANSWERED

    def _internal_error(self, turn: Turn, event: on.InternalError) -> Outcome:
        outcome = self._refuse(turn, Rejection(500, Reason.INTERNAL_ERROR, event.message))
        self._leg.cancel(turn)
        return outcome

    def _abandon(self, turn: Turn, failure: Failure) -> Outcome:
        headers: Headers = ()
        if not failure.is_clients_fault:
            retry = self._retry_headers(failure)
            headers = retry if self._environment.gateway.repeats_requests else replies.RETRY_BY_CLIENT
        turn.commands.append(replies.answer_failure(failure, self._intake.errors, headers))
        return Outcome.ANSWERED

    def _retry_headers(self, failure: Failure) -> Headers:
        return self._effects.retry_headers(failure, len(self._intake.earlier.failed) + 1)

    def _closed(self, turn: Turn, event: on.MainClosed) -> Outcome:
        if self.state is MainState.ROUTED and self._leg.sent_here and not self.hears_response:
            self.is_unheard = True
            self._effects.responses_skipped()
            return Outcome.CLOSED
        self._effects.end(turn.now)
        if not event.keeps_leg:
            self._leg.cancel(turn)
        return Outcome.CLOSED

    def end_unheard(self, turn: Turn) -> None:
        """End the reservations of a request whose stream has ended before the response."""
        self.is_unheard = False
        self._effects.end(turn.now)

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
            (MainState.ERROR_BODY, on.ResponseTrailers): _error_text,
            (MainState.MERGING, on.ResponseBody): _keep_piece,
            (MainState.MERGING, on.ResponseTrailers): _keep_piece,
            on.ResponseBody: _response_piece,
            on.ResponseTrailers: _response_piece,
            **dict.fromkeys([key for key in MAIN if key[0] is MainState.ANSWERED], _ignore),
            (MainState.ANSWERED, on.MainClosed): _closed,
            on.MainClosed: _closed,
            on.RoomFreed: _room_freed,
            on.QueueExpired: _queue_expired,
            on.AbortWanted: _abort_wanted,
            on.InternalError: _internal_error,
            (MainState.HELD, on.ResponseBody): _held_piece,
            (MainState.HELD, on.ResponseTrailers): _held_piece,
            (MainState.HELD, Signal.ADVANCE): _commit_held,
            Signal.ADVANCE: _body_paused,
            Signal.COMMIT: _commit_held,
            Signal.ABANDON: _abandon,
            Signal.TEXT_COMPLETE: _merge_pieces,
        },
    )
