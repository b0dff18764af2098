"""The three state machines of an attempt as tables: ``TABLE[state, cause][outcome]`` is the next state.

A cause is the type of an event, or a signal that one machine sends to another. An action looks at the event and
returns an outcome; the table alone gives the next state. Main-stream messages that are not in the table violate the
ext_proc protocol. Every other cause that is not in a table has no effect on that machine.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum, auto
from typing import Final, TypeVar

from dp_extproc.attempt import events as on


class MainState(IntEnum):
    """State of the main stream."""

    START = auto()
    BODY = auto()
    """The request headers have arrived; the body is awaited."""
    QUEUED = auto()
    """The request is complete, but no rank has room for it."""
    PASSING = auto()
    """The request is not an inference request, so it has no reservations."""
    ROUTED = auto()
    """The request is on its way to the engines; the response is awaited."""
    HELD = auto()
    """The response headers are withheld until both legs are good."""
    ERROR_BODY = auto()
    """The response is an engine's error (4xx or 5xx) whose text is awaited."""
    RESPONDING = auto()
    """The response headers were committed to the client."""
    MERGING = auto()
    """A piece of the response waits for the log probabilities of the prefill leg."""
    ANSWERED = auto()
    """An immediate response was sent."""
    CLOSED = auto()


class LegState(IntEnum):
    """State of the prefill leg."""

    ABSENT = auto()
    """The attempt has no prefill leg, or none yet."""
    UNSUPERVISED = auto()
    """With ``supervision: off`` the stream of the leg opens with its response."""
    AWAITED = auto()
    OPEN = auto()
    CHECKING = auto()
    """The response has status 200 and is a stream; its first event is awaited."""
    ERROR_BODY = auto()
    """The response is an error whose text is awaited."""
    DONE = auto()
    FAILED = auto()
    MISSING = auto()
    """The leg did not report here; it may run all the same."""
    CANCELLED = auto()


class FirstState(IntEnum):
    """State of the first event of the response."""

    CLEAR = auto()
    """No first event is awaited."""
    PENDING = auto()
    COMMENTED = auto()
    """Comments have come, and the first event is awaited; they pass once the prefill leg is good."""


class Signal(IntEnum):
    """A cause that is not an event."""

    ADVANCE = auto()
    """A deadline has passed."""
    SCHEDULED = auto()
    """Scheduling has picked the endpoints."""
    COMMIT = auto()
    """Both legs are good."""
    ABANDON = auto()
    """A leg has failed, so its failure answers the client in place of the engine."""
    CANCEL = auto()
    """The prefill leg is of no use any more."""
    TEXT_COMPLETE = auto()
    """The prefill leg's response is complete, or is not awaited any longer."""


class Outcome(IntEnum):
    """Result of an action."""

    UNCHANGED = auto()
    AWAITS_BODY = auto()
    AWAITS_ERROR = auto()
    AWAITS_EVENT = auto()
    AWAITS_LEG = auto()
    AWAITS_TEXT = auto()
    QUEUED = auto()
    PASSED = auto()
    ROUTED = auto()
    HELD = auto()
    RELEASED = auto()
    """The response may go to the client."""
    ANSWERED = auto()
    CLOSED = auto()
    OPENED = auto()
    DONE = auto()
    FAILED = auto()
    MISSING = auto()
    CANCELLED = auto()
    UNSUPERVISED = auto()


_S = TypeVar("_S", MainState, LegState, FirstState)
Cause = type | Signal
Row = Mapping[Outcome, _S]
Table = dict[tuple[_S, Cause], Row[_S]]


def _same(states: Iterable[_S], *causes: Cause) -> Table[_S]:
    return {(state, cause): {Outcome.UNCHANGED: state} for state in states for cause in causes}


def _all(states: Iterable[_S], causes: Iterable[Cause], row: Row[_S]) -> Table[_S]:
    return {(state, cause): row for state in states for cause in causes}


_REQUEST: Final = (on.RequestBody, on.RequestTrailers)
_RESPONSE: Final = (on.ResponseBody, on.ResponseTrailers)
_ANSWERED: Final = {Outcome.ANSWERED: MainState.ANSWERED}
_DECIDED: Final = {**_ANSWERED, Outcome.ROUTED: MainState.ROUTED, Outcome.QUEUED: MainState.QUEUED}
_PASSED: Final = {Outcome.PASSED: MainState.PASSING}
_COLLECTED: Final = {**_DECIDED, **_PASSED, Outcome.AWAITS_BODY: MainState.BODY}
_RELEASED: Final = {Outcome.RELEASED: MainState.RESPONDING}

ABANDONABLE: Final = frozenset({MainState.ROUTED, MainState.HELD, MainState.ERROR_BODY})
"""States in which the client can still get another answer than the engine's."""
_WITH_LEGS: Final = (*ABANDONABLE, MainState.RESPONDING, MainState.MERGING, MainState.CLOSED)
"""States in which legs may be at their engines."""
UNDECIDED: Final = frozenset({MainState.START, MainState.BODY, MainState.QUEUED})

MAIN: Final[Table[MainState]] = {
    (MainState.START, on.RequestHeaders): _COLLECTED,
    (MainState.BODY, on.RequestBody): _COLLECTED,
    (MainState.BODY, on.RequestTrailers): {**_DECIDED, **_PASSED},
    (MainState.BODY, Signal.ADVANCE): _ANSWERED,
    (MainState.QUEUED, on.RoomFreed): _DECIDED,
    (MainState.QUEUED, on.QueueExpired): _ANSWERED,
    (MainState.QUEUED, on.AbortWanted): {Outcome.UNCHANGED: MainState.QUEUED, **_ANSWERED},
    **_same(_WITH_LEGS, on.AbortWanted),
    # Envoy or another filter may answer by itself at any time.
    **_all((MainState.START, MainState.BODY, MainState.QUEUED, MainState.PASSING), (on.ResponseHeaders,), _RELEASED),
    (MainState.ROUTED, on.ResponseHeaders): {
        **_RELEASED,
        Outcome.HELD: MainState.HELD,
        Outcome.AWAITS_ERROR: MainState.ERROR_BODY,
    },
    **_all((MainState.HELD,), (Signal.COMMIT, Signal.ADVANCE), _RELEASED),
    (MainState.HELD, on.ResponseBody): {Outcome.UNCHANGED: MainState.HELD, **_RELEASED},
    **_same((MainState.HELD,), on.ResponseTrailers),
    (MainState.ERROR_BODY, on.ResponseBody): {Outcome.UNCHANGED: MainState.ERROR_BODY, **_RELEASED},
    (MainState.ERROR_BODY, on.ResponseTrailers): _RELEASED,
    **_all(ABANDONABLE, (Signal.ABANDON,), _ANSWERED),
    **_same((MainState.PASSING, MainState.ROUTED, MainState.HELD, MainState.RESPONDING, MainState.MERGING), *_REQUEST),
    **_same((MainState.RESPONDING, MainState.MERGING), *_RESPONSE),
    (MainState.RESPONDING, on.ResponseBody): {
        Outcome.UNCHANGED: MainState.RESPONDING,
        Outcome.AWAITS_TEXT: MainState.MERGING,
    },
    (MainState.MERGING, Signal.TEXT_COMPLETE): _RELEASED,
    **_same((MainState.ANSWERED,), on.RequestHeaders, on.ResponseHeaders, *_REQUEST, *_RESPONSE),
    **_all((*UNDECIDED, MainState.PASSING, *ABANDONABLE), (on.InternalError,), _ANSWERED),
    **_all(set(MainState) - {MainState.CLOSED}, (on.MainClosed,), {Outcome.CLOSED: MainState.CLOSED}),
}

UNOPENED: Final = frozenset({LegState.UNSUPERVISED, LegState.AWAITED, LegState.MISSING})
"""States in which the stream of the leg has not opened, but still may."""
GOOD: Final = frozenset({LegState.ABSENT, LegState.UNSUPERVISED, LegState.DONE, LegState.MISSING})
"""States in which the prefill leg does not keep the response from the client."""

LEG: Final[Table[LegState]] = {
    (LegState.ABSENT, Signal.SCHEDULED): {
        Outcome.UNSUPERVISED: LegState.UNSUPERVISED,
        Outcome.AWAITS_LEG: LegState.AWAITED,
        Outcome.OPENED: LegState.OPEN,
    },
    **_all((LegState.AWAITED, LegState.MISSING), (on.LegOpened,), {Outcome.OPENED: LegState.OPEN}),
    **_all(
        (*UNOPENED, LegState.OPEN),
        (on.LegHeaders,),
        {
            Outcome.AWAITS_EVENT: LegState.CHECKING,
            Outcome.AWAITS_ERROR: LegState.ERROR_BODY,
            Outcome.DONE: LegState.DONE,
            Outcome.FAILED: LegState.FAILED,
        },
    ),
    (LegState.CHECKING, on.LegBody): {
        Outcome.UNCHANGED: LegState.CHECKING,
        Outcome.DONE: LegState.DONE,
        Outcome.FAILED: LegState.FAILED,
    },
    **_all((LegState.ERROR_BODY,), (on.LegBody, on.LegClosed, Signal.ADVANCE), {Outcome.FAILED: LegState.FAILED}),
    **_all(
        (LegState.UNSUPERVISED, LegState.OPEN, LegState.CHECKING), (on.LegClosed,), {Outcome.FAILED: LegState.FAILED}
    ),
    **_all((LegState.UNSUPERVISED, LegState.OPEN), (on.LegUnseen,), {Outcome.MISSING: LegState.MISSING}),
    (LegState.AWAITED, Signal.ADVANCE): {Outcome.MISSING: LegState.MISSING},
    **_all(
        (LegState.AWAITED, LegState.MISSING, LegState.OPEN, LegState.CHECKING, LegState.ERROR_BODY),
        (Signal.CANCEL,),
        {Outcome.CANCELLED: LegState.CANCELLED},
    ),
    (LegState.CANCELLED, on.LegOpened): {Outcome.CANCELLED: LegState.CANCELLED},
}

FIRST_EVENT: Final[Table[FirstState]] = {
    (FirstState.CLEAR, Signal.SCHEDULED): {Outcome.AWAITS_EVENT: FirstState.PENDING},
    (FirstState.PENDING, on.ResponseHeaders): {Outcome.UNCHANGED: FirstState.PENDING, Outcome.DONE: FirstState.CLEAR},
    (FirstState.COMMENTED, on.ResponseHeaders): {
        Outcome.UNCHANGED: FirstState.COMMENTED,
        Outcome.DONE: FirstState.CLEAR,
    },
    (FirstState.PENDING, on.CommentRead): {Outcome.UNCHANGED: FirstState.COMMENTED},
    **_all(
        (FirstState.PENDING, FirstState.COMMENTED),
        (on.FirstEventRead,),
        {Outcome.DONE: FirstState.CLEAR, Outcome.FAILED: FirstState.CLEAR},
    ),
}
