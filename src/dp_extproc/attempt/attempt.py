"""One attempt of a request as a state machine: events in, commands out.

Rules that live here and nowhere else:

1. A failed leg ends the other one at once, and so does a client that leaves.
2. The response headers are held until the prefill leg is good, and for a stream until its first event is no error.
   A failure up to then becomes a retry or a clean error, whatever status the engine began with. A stream that begins
   with comments, or whose encoding cannot be read, is not held for its first event.
3. After an immediate response no other reply follows, and none is sent once the response has begun.
4. A main stream may begin with the response, because Envoy or another filter answered by itself. It passes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final, get_args

from dp_extproc.attempt.effects import Effects, Environment
from dp_extproc.attempt.events import BodyMode, Command, Event, FirstEvent, LegEvent, MainEvent, ToLeg
from dp_extproc.attempt.failures import ABORTED, Failure, engine_error, timed_out
from dp_extproc.attempt.first_event_watch import FirstEventWatch
from dp_extproc.attempt.gateways import BUNDLED, Peer
from dp_extproc.attempt.intake import Intake
from dp_extproc.attempt.machine import Turn
from dp_extproc.attempt.main_stream import MainStream
from dp_extproc.attempt.prefill_leg import PrefillLeg
from dp_extproc.attempt.transitions import GOOD, FirstState, LegState, MainState, Signal
from dp_extproc.config.reliability import Supervise
from dp_extproc.engines.model import Role

LEG_OPENS_SECONDS: Final = 2.0
"""Seconds that a response is held for a prefill leg that has not opened. Most open before the response begins."""
EXTEND_AFTER_SECONDS: Final = 5.0
"""Seconds that a response is held before Envoy's patience of 20 s is extended."""
ERROR_TEXT_SECONDS: Final = 2.0
"""Seconds that the text of an error may take behind its headers."""
LIKENESS_SECONDS: Final = 2.0
"""Seconds for which an engine's error counts against no endpoint, because the next attempt may fail alike.

An error that a request causes by its content comes as soon as an engine reads it.
"""
UNHEARD_SECONDS: Final = 2.0
"""Seconds after prefill for which a decode reservation is kept whose end the gateway does not report.

By then the engine's own load page has counted the request. Without them decode ranks look idle until it has.
"""
LEG_TEXT_SECONDS: Final = 5.0
"""Seconds that a piece of the response waits for the prefill leg's text. Envoy waits 20 s for a reply."""

_MESSAGES: Final = frozenset(get_args(MainEvent))
_LEG_EVENTS: Final = frozenset(get_args(LegEvent))
_FIRST_EVENTS: Final = frozenset(get_args(FirstEvent))
_WAITING: Final = frozenset({MainState.HELD, MainState.MERGING})
"""States in which the main stream waits for another part of the attempt."""
_OVER: Final = frozenset({LegState.FAILED, LegState.MISSING, LegState.CANCELLED})
"""States in which the prefill leg reports nothing more, and has not computed the prompt as far as is known."""
_UNSETTLED: Final = frozenset({LegState.OPEN, LegState.CHECKING, LegState.ERROR_BODY})
"""States in which something of the prefill leg is awaited that may take too long."""


class ProtocolViolationError(Exception):
    """Envoy has sent a message that the ext_proc protocol does not allow in this state; the stream cannot be served."""


class Attempt:
    """From the request headers to the end of the main stream."""

    __slots__ = ("_body_pause", "_effects", "_supervision", "first_event", "leg", "main")

    def __init__(
        self,
        environment: Environment,
        mode: BodyMode,
        response_mode: BodyMode = BodyMode.LOCKSTEP,
        subset: frozenset[str] | None = None,
        peer: Peer = BUNDLED,
    ) -> None:
        """Begin.

        Args:
            environment: Collaborators and settings.
            mode: ``protocol_config.request_body_mode`` of the first message of the stream.
            response_mode: The mode of the response body.
            subset: Addresses of the endpoints that the gateway allows; None for all.
            peer: The instance of the gateway.
        """
        self._supervision = environment.supervision
        self._body_pause = environment.body_pause if mode is BodyMode.DUPLEX else math.inf
        self._effects = Effects(environment)
        intake = Intake(environment.decider, environment.gateway, mode, environment.max_body, subset)
        self.leg = PrefillLeg(self._effects, is_supervised=environment.supervision.mode is not Supervise.OFF)
        self.first_event = FirstEventWatch()
        self.main = MainStream(
            environment, self._effects, intake, response_mode, peer, leg=self.leg, first_event=self.first_event
        )

    def receive(self, event: Event, now: float) -> list[Command]:
        """Receive an event.

        Args:
            event: The event.
            now: Monotonic seconds.

        Returns:
            What is to be done, in order.

        Raises:
            ProtocolViolationError: The message is not allowed in this state of the main stream.
        """
        turn = Turn(now)
        cause = type(event)
        if cause in _LEG_EVENTS:
            self.leg.receive(event, turn)
        elif cause in _FIRST_EVENTS:
            self.first_event.move(cause, turn, event)
        elif not self.main.move(cause, turn, event) and cause in _MESSAGES:
            raise ProtocolViolationError(f"{cause.__name__} is not expected in state {self.main.state.name}")
        if turn.failure is not None or self.main.state in _WAITING or self.main.is_unheard:
            self._apply_rules(turn)
        return turn.commands

    def advance(self, now: float) -> list[Command]:
        """Let time pass: give up what takes too long, and have Envoy wait for what may still come."""
        turn = Turn(now)
        for deadline, action in self._deadlines():
            if now > deadline:
                action(turn)
                self._apply_rules(turn)
                break
        return turn.commands

    @property
    def deadline(self) -> float:
        """The earliest moment behind which :meth:`advance` has something to do."""
        if self.main.state is MainState.RESPONDING and self.leg.state not in _UNSETTLED:
            return math.inf  # as most attempts are for most of the time
        return min((deadline for deadline, _ in self._deadlines()), default=math.inf)

    @property
    def token(self) -> str:
        """Token of the prefill leg; empty if the attempt has none."""
        return self._effects.token

    def is_over(self, now: float) -> bool:
        """Return whether the main stream has ended, and nothing else is awaited."""
        closed = self.main.state is MainState.CLOSED
        return closed and not self.main.is_unheard and now > self.leg.late_until

    def _apply_rules(self, turn: Turn) -> None:
        """Let a failure have its consequences, and commit or merge what is awaited no longer."""
        main = self.main
        if (failure := turn.failure) is not None:
            turn.failure = None
            self._fail(turn, failure)
        if main.state is MainState.HELD:
            if self.first_event.state is not FirstState.PENDING and self.leg.state in GOOD:
                main.move(Signal.COMMIT, turn)
        elif main.state is MainState.MERGING and main.merging is not None and not main.merging.awaits_text:
            main.move(Signal.TEXT_COMPLETE, turn)
        elif main.is_unheard and self.leg.state in _OVER:
            main.end_unheard(turn)

    def _fail(self, turn: Turn, failure: Failure) -> None:
        """Blame an endpoint, answer the client while that is possible, and end the other leg."""
        if self.main.aborts.are_wanted:
            failure = ABORTED
        if not self.leg.was_cancelled:
            if self.main.is_routed:
                self.main.aborts.end_before_close(turn)
            is_answered = self.main.move(Signal.ABANDON, turn, failure)
            if not (is_answered and self.main.hears_response):  # an answer may be too late, and is ignored then
                self.main.aborts.end_decode(turn)
        self._effects.blame(failure, turn.now)
        self.leg.cancel(turn)

    # --- time ---

    def _deadlines(self) -> Iterator[tuple[float, Callable[[Turn], object]]]:
        """Give what is awaited, the most important first: until when, and what follows after that."""
        main, state = self.main, self.main.state
        if state is MainState.BODY:
            yield main.body_at + self._body_pause, lambda turn: main.move(Signal.ADVANCE, turn)
        elif main.merging is not None and state is MainState.MERGING:
            yield main.merging.since + LEG_TEXT_SECONDS, lambda turn: main.move(Signal.TEXT_COMPLETE, turn)
        if state is MainState.HELD:
            yield main.hold_ends_at, lambda turn: main.move(Signal.ADVANCE, turn)
        if main.is_unheard and self.leg.done_at is not None:
            yield self.leg.done_at + UNHEARD_SECONDS, main.end_unheard
        if state is MainState.ERROR_BODY:
            yield main.error_at + ERROR_TEXT_SECONDS, self._give_up_error
        if state >= MainState.ROUTED and not self.leg.was_cancelled:
            yield from self._supervision_deadlines()

    def _supervision_deadlines(self) -> Iterator[tuple[float, Callable[[Turn], object]]]:
        main, leg, settings = self.main, self.leg, self._supervision
        if leg.state is LegState.ERROR_BODY:
            yield leg.error_at + ERROR_TEXT_SECONDS, self._give_up_leg_error
        if main.state is MainState.ERROR_BODY:
            return
        if leg.is_supervised and leg.state in {LegState.OPEN, LegState.CHECKING}:
            yield main.picked_at + self._effects.prefill_timeout, self._give_up_prefill
        if (since := self._first_token_since()) is not None:
            yield since + settings.first_token_timeout, self._give_up_first_token
        if main.state is MainState.HELD and leg.state is LegState.AWAITED:
            yield main.held.since + LEG_OPENS_SECONDS, lambda turn: leg.move(Signal.ADVANCE, turn)
        if self._effects.awaits_likeness:
            yield main.picked_at + LIKENESS_SECONDS, lambda _turn: self._effects.count_earlier_error()
        if main.state is MainState.HELD and not main.is_extended:
            yield main.held.since + EXTEND_AFTER_SECONDS, main.extend

    def _first_token_since(self) -> float | None:
        """Give the moment from which the first token of a stream is awaited; None if none is.

        A response that is no stream has its headers at its end, which may be far off. If the prefill leg does not
        report here, its end is unknown, so a stream may take the time of both legs.
        """
        if not self.main.streaming or self.main.state not in {MainState.ROUTED, MainState.HELD}:
            return None
        if not self.main.hears_response:
            return None  # it may be on its way to the client
        if self.leg.state in {LegState.AWAITED, LegState.MISSING}:
            return self.main.picked_at + self._effects.prefill_timeout
        return self.leg.done_at

    def _give_up_leg_error(self, turn: Turn) -> None:
        self.leg.move(Signal.ADVANCE, turn)
        self._apply_rules(turn)
        turn.commands.append(ToLeg.CANCEL)  # the rules do not end a leg that has failed, but its stream is still open

    def _give_up_error(self, turn: Turn) -> None:
        status = self.main.status
        message = f"the decode server answered {status}, and its message did not arrive in {ERROR_TEXT_SECONDS:g} s"
        failure = engine_error(Role.DECODE, status, b"", message)
        if self.leg.was_cancelled:  # by a refusal, so that the rules do not answer any more
            self.main.move(Signal.ABANDON, turn, failure)
        self._fail(turn, failure)

    def _give_up_prefill(self, turn: Turn) -> None:
        seconds = self._effects.prefill_timeout
        self._fail(turn, timed_out(Role.PREFILL, f"prefill took longer than {seconds:g} s"))

    def _give_up_first_token(self, turn: Turn) -> None:
        seconds = self._supervision.first_token_timeout
        self._fail(turn, timed_out(Role.DECODE, f"no token came within {seconds:g} s after prefill"))
