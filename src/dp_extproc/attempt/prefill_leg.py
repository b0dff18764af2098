"""The prefill leg of an attempt as a state machine."""

import math
from typing import Any, ClassVar, Final

from dp_extproc.attempt.effects import Effects
from dp_extproc.attempt.events import Event, LegBody, LegClosed, LegHeaders, LegOpened, ToLeg, Turn
from dp_extproc.attempt.failures import engine_error, failed
from dp_extproc.attempt.transitions import LEG, UNOPENED, Cause, LegState, Outcome, Signal, bind
from dp_extproc.engines.model import Role
from dp_extproc.load.in_flight import ERROR
from dp_extproc.response.first_event import FirstEvent
from dp_extproc.response.logprobs import LegText

LATE_SECONDS: Final = 10.0
"""Seconds after its cancellation in which the leg may still open, and is ended then."""
_OK: Final = 200


class PrefillLeg:
    """What the stream of the leg reports, and what is to happen to the leg."""

    __slots__ = (
        "_effects", "_events", "_status", "done_at", "error_at", "is_over", "late_until", "state", "supervises", "text",
    )  # fmt: skip

    def __init__(self, effects: Effects, *, supervises: bool) -> None:
        self._effects = effects
        self.supervises = supervises
        self._events: FirstEvent | None = None
        self._status = 0
        self.state = LegState.ABSENT
        self.is_over = False
        """Whether the leg is of no use any more. Then no failure of the attempt reaches the client."""
        self.done_at: float | None = None
        self.error_at = 0.0
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
        if self.text is not None:
            if isinstance(event, LegBody):
                self.text.take(event.data, end_of_stream=event.end_of_stream)
            elif isinstance(event, LegClosed):
                self.text.is_complete = True
        if not self.move(type(event), turn, event) and not isinstance(event, LegClosed):
            turn.commands.append(ToLeg.PROCEED)

    def move(self, cause: Cause, turn: Turn, event: Any = None) -> bool:
        """Take the transition of a cause, if there is one in this state; the only place where the state is set."""
        step = self._STEPS.get((self.state, cause))
        if step is None:
            return False
        row, action = step
        self.state = row[action(self, turn, event)]
        return True

    def cancel(self, turn: Turn) -> None:
        """End the leg; a leg that is not supervised goes on."""
        if not self.is_over:
            self.is_over = True
            if self.supervises:
                self.move(Signal.CANCEL, turn)

    # --- actions ---

    def _expect(self, _turn: Turn, _event: None) -> Outcome:
        return Outcome.AWAITS_LEG if self.supervises else Outcome.UNSUPERVISED

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
            if has_body and not self.is_over:
                self.error_at = turn.now
                turn.commands.append(ToLeg.BUFFER_BODY)
                return Outcome.AWAITS_ERROR
            turn.commands.append(ToLeg.PROCEED)
            return self._failed(turn, b"")
        if event.is_events and has_body:  # such headers may come before anything was computed
            self._events = FirstEvent()
            turn.commands.append(ToLeg.STREAM_BODY)
            return Outcome.AWAITS_EVENT
        wants_text = self.text is not None and has_body
        turn.commands.append(ToLeg.STREAM_BODY if wants_text else ToLeg.PROCEED)
        return self._done(turn, event.status)

    def _first_event(self, turn: Turn, event: LegBody) -> Outcome:
        events = self._events
        assert events is not None  # noqa: S101 - the state implies it
        turn.commands.append(ToLeg.PROCEED)
        events.feed(event.data, end_of_stream=event.end_of_stream)
        if not events.is_known:
            return Outcome.UNCHANGED
        if events.error is None:
            return self._done(turn, _OK)
        self._status = events.error.status
        self._effects.prefill_answered(self._status, turn.now)
        return self._failed(turn, events.error.body)

    def _error_text(self, turn: Turn, event: LegBody) -> Outcome:
        turn.commands.append(ToLeg.PROCEED)
        return self._failed(turn, event.data)

    def _error_without_text(self, turn: Turn, _event: LegClosed | None) -> Outcome:
        return self._failed(turn, b"")

    def _cut(self, turn: Turn, _event: LegClosed) -> Outcome:
        if self.supervises:
            turn.failure = failed(Role.PREFILL, "the prefill server's connection was cut")
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

    def _missing(self, _turn: Turn, _event: None) -> Outcome:
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
            (LegState.CHECKING, LegBody): _first_event,
            (LegState.ERROR_BODY, LegBody): _error_text,
            (LegState.ERROR_BODY, LegClosed): _error_without_text,
            (LegState.ERROR_BODY, Signal.ADVANCE): _error_without_text,
            LegClosed: _cut,
            Signal.ADVANCE: _missing,
            Signal.CANCEL: _cancelled,
        },
    )
