"""The prefill leg of an attempt as a state machine."""

import math
from typing import ClassVar, Final

from dp_extproc.attempt.effects import Effects
from dp_extproc.attempt.events import Event, LegBody, LegClosed, LegHeaders, LegOpened, LegUnseen, ToLeg
from dp_extproc.attempt.failures import engine_error, failed
from dp_extproc.attempt.machine import Machine, Turn, bind
from dp_extproc.attempt.transitions import LEG, UNOPENED, LegState, Outcome, Signal
from dp_extproc.engines.model import Role
from dp_extproc.load.in_flight import ERROR
from dp_extproc.response.first_event import FirstEventReader
from dp_extproc.response.merging import LegText
from dp_extproc.scheduling.decision import Decision

LATE_SECONDS: Final = 10.0
"""Seconds after its cancellation in which the leg may still open, and is ended then."""
_OK: Final = 200


class PrefillLeg(Machine[LegState]):
    """What the stream of the leg reports, and what is to happen to the leg."""

    __slots__ = (
        "_effects", "_first_event", "_status", "done_at", "error_at", "is_supervised", "late_until", "runs_here",
        "sent_here", "text", "was_cancelled",
    )  # fmt: skip

    def __init__(self, effects: Effects, *, is_supervised: bool) -> None:
        super().__init__(LegState.ABSENT)
        self._effects = effects
        self.is_supervised = is_supervised
        """Whether the leg's stream opens with its request, so that the leg can be ended; else with its response."""
        self.sent_here = False
        """Whether the service sends the leg itself."""
        self.runs_here = False
        """Whether a leg that the service sends has not ended."""
        self._first_event: FirstEventReader | None = None
        self._status = 0
        """Status of an error; that of one in the first event, if it is there."""
        self.was_cancelled = False
        """Whether the leg is of no use any more, in whichever state. From then on no failure reaches the client."""
        self.done_at: float | None = None
        """The time at which the prompt was computed; None if that is not reported."""
        self.error_at = 0.0
        """The time of the headers of an error."""
        self.late_until = -math.inf
        """Until when the leg may open though it was cancelled."""
        self.text: LegText | None = None
        """The text of the response, where it is wanted."""

    @property
    def may_open(self) -> bool:
        """Whether the stream of the leg has not opened, but still may."""
        return self.state in UNOPENED or (self.state is LegState.CANCELLED and self.late_until > -math.inf)

    def receive(self, event: Event, turn: Turn) -> None:
        """Receive an event of the leg's stream."""
        if isinstance(event, LegClosed):
            self.runs_here = False
        if self.text is not None:
            if isinstance(event, LegBody):
                self.text.take(event.data, end_of_stream=event.end_of_stream)
            elif isinstance(event, LegClosed):
                self.text.is_complete = True
        if not self.move(type(event), turn, event) and not isinstance(event, LegClosed):
            turn.commands.append(ToLeg.PROCEED)

    def cancel(self, turn: Turn) -> None:
        """End the leg; a leg that is not supervised goes on."""
        if not self.was_cancelled:
            self.was_cancelled = True
            if self.is_supervised:
                self.move(Signal.CANCEL, turn)

    # --- actions ---

    def _expect(self, _turn: Turn, decision: Decision) -> Outcome:
        self.sent_here = self.runs_here = decision.prefill is not None
        if not self.is_supervised:
            return Outcome.UNSUPERVISED
        return Outcome.OPENED if self.runs_here else Outcome.AWAITS_LEG

    def _opened(self, turn: Turn, _event: LegOpened) -> Outcome:
        turn.commands.append(ToLeg.PROCEED)
        return Outcome.OPENED

    def _opened_too_late(self, turn: Turn, _event: LegOpened) -> Outcome:
        turn.commands.append(ToLeg.CANCEL)
        return Outcome.CANCELLED

    def _headers(self, turn: Turn, event: LegHeaders) -> Outcome:
        has_body = not event.end_of_stream
        if event.status >= ERROR:
            self._status = event.status
            self._effects.prefill_answered(event.status, turn.now)
            if has_body and not self.was_cancelled:
                self.error_at = turn.now
                turn.commands.append(ToLeg.BUFFER_BODY)
                return Outcome.AWAITS_ERROR
            turn.commands.append(ToLeg.PROCEED)
            return self._failed(turn, b"")
        if event.is_events and has_body:  # such headers may come before anything was computed
            self._first_event = FirstEventReader()
            turn.commands.append(ToLeg.STREAM_BODY)
            return Outcome.AWAITS_EVENT
        wants_text = self.text is not None and has_body
        turn.commands.append(ToLeg.STREAM_BODY if wants_text else ToLeg.PROCEED)
        return self._done(turn, event.status)

    def _checked_body(self, turn: Turn, event: LegBody) -> Outcome:
        first = self._first_event
        assert first is not None  # noqa: S101 - the state implies it
        turn.commands.append(ToLeg.PROCEED)
        first.feed(event.data, end_of_stream=event.end_of_stream)
        if not first.is_known:
            return Outcome.UNCHANGED
        if first.error is None:
            return self._done(turn, _OK)
        self._status = first.error.status
        self._effects.prefill_answered(self._status, turn.now)
        return self._failed(turn, first.error.body)

    def _error_text(self, turn: Turn, event: LegBody) -> Outcome:
        turn.commands.append(ToLeg.PROCEED)
        return self._failed(turn, event.data)

    def _error_without_text(self, turn: Turn, _event: LegClosed | None) -> Outcome:
        return self._failed(turn, b"")

    def _cut(self, turn: Turn, event: LegClosed) -> Outcome:
        if self.is_supervised or self.sent_here:
            problem = event.problem or "the prefill server's connection was cut"
            turn.failure = failed(Role.PREFILL, problem, is_lost=event.is_lost)
        return Outcome.FAILED

    def _done(self, turn: Turn, status: int) -> Outcome:
        self.done_at = turn.now
        self._effects.prefill_answered(status, turn.now)
        self._effects.served(Role.PREFILL)
        return Outcome.DONE

    def _failed(self, turn: Turn, text: bytes) -> Outcome:
        message = f"the prefill server answered {self._status}"
        turn.failure = engine_error(Role.PREFILL, self._status, text, message)
        return Outcome.FAILED

    def _missing(self, _turn: Turn, _event: LegUnseen | None) -> Outcome:
        self._effects.leg_missing()
        return Outcome.MISSING

    def _cancelled(self, turn: Turn, _event: None) -> Outcome:
        if self.state in UNOPENED:
            self.late_until = turn.now + LATE_SECONDS
        else:
            turn.commands.append(ToLeg.CANCEL)
        return Outcome.CANCELLED

    _STEPS: ClassVar = bind(
        LEG,
        {
            Signal.SCHEDULED: _expect,
            LegOpened: _opened,
            (LegState.CANCELLED, LegOpened): _opened_too_late,
            LegHeaders: _headers,
            (LegState.CHECKING, LegBody): _checked_body,
            (LegState.ERROR_BODY, LegBody): _error_text,
            (LegState.ERROR_BODY, LegClosed): _error_without_text,
            (LegState.ERROR_BODY, Signal.ADVANCE): _error_without_text,
            LegClosed: _cut,
            LegUnseen: _missing,
            Signal.ADVANCE: _missing,
            Signal.CANCEL: _cancelled,
        },
    )
