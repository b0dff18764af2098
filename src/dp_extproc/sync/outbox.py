"""The outbox: turns the events of this replica's in-flight requests into messages for its peers.

Events arrive on the request path, where they are only appended to a list. Everything else is done by
:meth:`Outbox.collect`, which returns bytes for a bus.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

from msgspec import Raw

from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import (
    MOST_REPEATED,
    REPEATED,
    Batch,
    Ended,
    Event,
    FirstToken,
    Notice,
    Placed,
    PrefillAnswered,
    Snapshot,
    SnapshotRequest,
    encode,
    split_events,
    split_notices,
    write_notice,
)

HEARTBEAT: Final = 0.5
"""Seconds after which a replica without events publishes an empty batch. Peers detect missing batches by it, too, so it
bounds for how long a lost message goes unnoticed."""


class Outbox:
    """The unsent events and the open attempts. Implements :class:`dp_extproc.load.in_flight.InFlightListener`."""

    def __init__(self, replica: str) -> None:
        self.replica = replica
        """The name of this replica. It is random, so that peers take a restarted process for another replica."""
        self._unsent: list[Event] = []
        self._open: dict[int, list[Event]] = {}
        """The events so far of each open attempt."""
        self._notices: list[Raw] = []
        """The unsent notices."""
        self._repeated: deque[tuple[float, Raw]] = deque(maxlen=MOST_REPEATED)
        """The notices that snapshots repeat, and until when each."""
        self._sequence = 0
        self._last_batch_at = float("-inf")
        self._owes_snapshot = False
        self._snapshot_requests: list[str | None] = []

    # --- on the request path ---

    def opened(self, attempt: int, record: PlacementRecord, now: float) -> None:
        event = Placed(attempt, now, record)
        self._unsent.append(event)
        self._open[attempt] = [event]

    def prefill_answered(self, attempt: int, now: float) -> None:
        self._progress(PrefillAnswered(attempt, now))

    def first_token(self, attempt: int, now: float) -> None:
        self._progress(FirstToken(attempt, now))

    def ended(self, attempt: int, now: float) -> None:
        if self._open.pop(attempt, None) is not None:
            self._unsent.append(Ended(attempt, now))

    def publish(self, notice: Notice) -> None:
        """Publish a notice to all other replicas."""
        written = write_notice(notice)
        self._notices.append(written)
        if (seconds := REPEATED.get(type(notice))) is not None:
            self._repeated.append((notice.at + seconds, written))

    def _progress(self, event: PrefillAnswered | FirstToken) -> None:
        if (history := self._open.get(event.attempt)) is not None:
            history.append(event)
            self._unsent.append(event)

    # --- off the request path ---

    def request_snapshot(self, of: str | None) -> None:
        """Request a snapshot of a replica with the next messages; None requests it of all."""
        self._snapshot_requests.append(of)

    def send_snapshot(self) -> None:
        """Add one snapshot to the next messages, however many peers have requested it."""
        self._owes_snapshot = True

    def collect(self, now: float) -> list[bytes]:
        """Return the messages that are due."""
        messages = [encode(SnapshotRequest(self.replica, of)) for of in dict.fromkeys(self._snapshot_requests)]
        self._snapshot_requests.clear()
        if self._unsent or self._notices or self._owes_snapshot or now - self._last_batch_at >= HEARTBEAT:
            messages += self._batches(now)
        if self._owes_snapshot:
            messages += self._snapshot(now)
            self._owes_snapshot = False
        return messages

    def _batches(self, now: float) -> Iterator[bytes]:
        # Attempts that began and ended since the last batch are sent, too: their prompts are cached now.
        unsent, self._unsent = self._unsent, []
        notices, self._notices = self._notices, []
        self._last_batch_at = now
        for events, part in _parts(unsent, notices):
            self._sequence += 1
            yield encode(Batch(self.replica, self._sequence, now, events, part))

    def _snapshot(self, now: float) -> Iterator[bytes]:
        """Encode a snapshot. It is sent behind a batch only, so that no two have the same sequence number."""
        opened = list(chain.from_iterable(self._open.values()))
        parts = _parts(opened, [notice for until, notice in self._repeated if now < until])
        for part, (events, notices) in enumerate(parts):
            yield encode(Snapshot(self.replica, self._sequence, now, part, len(parts), events, notices))


def _parts(events: Sequence[Event], notices: Sequence[Raw]) -> list[tuple[tuple[Event, ...], tuple[Raw, ...]]]:
    """Split events and notices into what each message has of them; one message at least."""
    parts: list[tuple[tuple[Event, ...], tuple[Raw, ...]]] = [(tuple(each), ()) for each in split_events(events)]
    parts += [((), each) for each in split_notices(notices)]
    return parts or [((), ())]
