"""What this replica has to tell. Pure: messages come out as bytes when somebody collects them.

It is told of attempts on the request path, where it appends to a list; everything else is done at collecting.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Final

from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import (
    Ask,
    Batch,
    Dispatched,
    Ended,
    Event,
    FirstToken,
    PrefillAnswered,
    Snapshot,
    encode,
    portions,
)

HEARTBEAT: Final = 0.5
"""Seconds after which a replica with nothing to tell says that it lives. Peers see by it, too, what they have missed,
so it bounds for how long a lost message goes unnoticed."""


class Outbox:
    """Collects events and makes messages of them. Implements :class:`dp_extproc.load.in_flight.InFlightListener`."""

    def __init__(self, replica: str) -> None:
        """Begin.

        Args:
            replica: The name of this replica: random, so that a restarted process is another one to its peers.
        """
        self.replica = replica
        self._news: list[Event] = []
        self._open: dict[int, list[Event]] = {}
        """Of each open attempt, what has happened to it."""
        self._sequence = 0
        self._spoke = float("-inf")
        self._asked = False
        self._questions: list[str | None] = []

    @property
    def open_attempts(self) -> int:
        return len(self._open)

    # --- on the request path ---

    def opened(self, attempt: int, dispatch: PlacementRecord, now: float) -> None:
        event = Dispatched(attempt, now, dispatch)
        self._news.append(event)
        self._open[attempt] = [event]

    def prefill_answered(self, attempt: int, now: float) -> None:
        self._went_on(PrefillAnswered(attempt, now))

    def first_token(self, attempt: int, now: float) -> None:
        self._went_on(FirstToken(attempt, now))

    def ended(self, attempt: int, now: float) -> None:
        if self._open.pop(attempt, None) is not None:
            self._news.append(Ended(attempt, now))

    def _went_on(self, event: PrefillAnswered | FirstToken) -> None:
        if (history := self._open.get(event.attempt)) is not None:
            history.append(event)
            self._news.append(event)

    # --- at leisure ---

    def ask(self, of: str | None) -> None:
        """Ask a replica for a snapshot with the next messages; None asks all."""
        self._questions.append(of)

    def answer(self) -> None:
        """Send a snapshot with the next messages. However many have asked, it is one for all."""
        self._asked = True

    def collect(self, now: float) -> list[bytes]:
        """Give the messages that are due."""
        messages = [encode(Ask(self.replica, of)) for of in dict.fromkeys(self._questions)]
        self._questions.clear()
        if self._news or self._asked or now - self._spoke >= HEARTBEAT:
            messages += self._batches(now)
        if self._asked:
            messages += self._snapshot(now)
            self._asked = False
        return messages

    def _batches(self, now: float) -> Iterator[bytes]:
        """An attempt that began and ended within one is told as any other: where its prompt is cached is news, too."""
        news, self._news = self._news, []
        self._spoke = now
        for events in list(portions(news)) or [()]:
            self._sequence += 1
            yield encode(Batch(self.replica, self._sequence, now, tuple(events)))

    def _snapshot(self, now: float) -> Iterator[bytes]:
        """A batch has gone before, so no two snapshots have the same sequence number."""
        parts = list(portions(list(chain.from_iterable(self._open.values())))) or [()]
        for part, events in enumerate(parts):
            yield encode(Snapshot(self.replica, self._sequence, now, part, len(parts), tuple(events)))
