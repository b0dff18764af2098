"""The first event of a streamed response as a state machine."""

from typing import ClassVar

from dp_extproc.attempt.events import CommentRead, FirstEvent, FirstEventRead, ResponseHeaders
from dp_extproc.attempt.failures import engine_error
from dp_extproc.attempt.machine import Machine, Turn, bind
from dp_extproc.attempt.transitions import FIRST_EVENT, FirstState, Outcome, Signal
from dp_extproc.engines.model import Role
from dp_extproc.response.first_event import FirstEventReader
from dp_extproc.response.renaming import Renames
from dp_extproc.scheduling.decision import Decision


class FirstEventWatch(Machine[FirstState]):
    """Whether the first event is awaited, so that an error in it can still become a retry or a clean error."""

    __slots__ = ("_is_unknown", "_reader", "renames")

    def __init__(self) -> None:
        super().__init__(FirstState.CLEAR)
        self._is_unknown = False
        """Whether only the response headers will show that the response is a stream."""
        self._reader: FirstEventReader | None = None
        self.renames: Renames | None = None
        """The ids to be changed in the response, on the stream that sees its first event."""

    def feed(self, turn: Turn, data: bytes, *, end_of_stream: bool) -> None:
        """Read a piece of the response, where it passes through the main stream, until the first event is known."""
        if self.state is FirstState.CLEAR:
            return
        reader = self._reader = self._reader or FirstEventReader()
        reader.feed(data, end_of_stream=end_of_stream)
        if (event := report(reader)) is not None:
            self.move(type(event), turn, event)

    def _scheduled(self, _turn: Turn, decision: Decision) -> Outcome:
        self._is_unknown = decision.streaming is None
        return Outcome.AWAITS_EVENT

    def _headers(self, _turn: Turn, event: ResponseHeaders) -> Outcome:
        has_none = event.end_of_stream or event.is_encoded or (self._is_unknown and not event.is_events)
        return Outcome.DONE if has_none else Outcome.UNCHANGED

    def _commented(self, _turn: Turn, _event: CommentRead) -> Outcome:
        return Outcome.UNCHANGED

    def _read(self, turn: Turn, event: FirstEventRead) -> Outcome:
        if (error := event.error) is None:
            return Outcome.DONE
        message = f"the decode server answered 200, and then the error {error.status}"
        turn.failure = engine_error(Role.DECODE, error.status, error.body, message)
        return Outcome.FAILED

    _STEPS: ClassVar = bind(
        FIRST_EVENT,
        {Signal.SCHEDULED: _scheduled, ResponseHeaders: _headers, CommentRead: _commented, FirstEventRead: _read},
    )


def report(reader: FirstEventReader) -> FirstEvent | None:
    """Report what was read of a stream so far; None for nothing that changes anything."""
    if reader.is_known:
        return FirstEventRead(reader.error)
    return CommentRead() if reader.has_comment else None
