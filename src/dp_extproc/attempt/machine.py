"""The three state machines of an attempt run alike: a table has the transitions, and an action finds each outcome."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from dp_extproc.attempt.events import Command
from dp_extproc.attempt.failures import Failure
from dp_extproc.attempt.transitions import Cause, FirstState, LegState, MainState, Outcome, Row, Table

_S = TypeVar("_S", MainState, LegState, FirstState)
_Step = tuple[Row[_S], Callable[..., Outcome]]


class Turn:
    """One event on its way through the state machines, and what it causes."""

    __slots__ = ("commands", "failure", "now")

    def __init__(self, now: float) -> None:
        self.now = now
        """Monotonic seconds."""
        self.commands: list[Command] = []
        self.failure: Failure | None = None
        """The failure of a leg, to be handled once the leg has its next state."""


def bind(table: Table[_S], actions: Mapping[Any, Callable[..., Outcome]]) -> Mapping[tuple[_S, Cause], _Step[_S]]:
    """Give each row of a table its action: that of the cause in this state, else that of the cause."""
    return {
        (state, cause): (row, actions[state, cause] if (state, cause) in actions else actions[cause])
        for (state, cause), row in table.items()
    }


class Machine(Generic[_S]):
    """A state, and the only place where it is set."""

    __slots__ = ("state",)

    _STEPS: ClassVar[Mapping[Any, _Step[Any]]]
    """Row and action of each state and cause, from :func:`bind`."""

    def __init__(self, state: _S) -> None:
        self.state: _S = state

    def move(self, cause: Cause, turn: Turn, event: Any = None) -> bool:
        """Take the transition of a cause; return whether there is one in this state."""
        if (step := self._STEPS.get((self.state, cause))) is None:
            return False
        row, action = step
        self.state = row[action(self, turn, event)]
        return True
