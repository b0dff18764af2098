"""The in-flight requests of all peers, by messages over a bus that may lose, repeat and reorder them.

Rule 1: batches of a peer are applied in the order of their sequence numbers, each once. A batch that is ahead waits.
Rule 2: while a batch is missing, a snapshot is requested: all attempts that the peer has open after a certain batch.
Rule 3: a snapshot replaces the known attempts of the peer. An attempt that is not in the snapshot has ended.
Rule 4: a peer without a message for the peer timeout is gone, and its attempts end. When it returns, it is new.
Rule 5: notices concern no attempt. Each goes to one listener, which may get it repeatedly.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from msgspec import Raw

from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import (
    AnyNotice,
    Batch,
    Ended,
    Event,
    FirstToken,
    Placed,
    PrefillAnswered,
    Snapshot,
    read_notices,
)

FIRST_REQUEST_SECONDS: Final = 0.05
"""Seconds for a missing batch to come by itself: late, or in a snapshot that another peer has requested."""
REQUEST_AGAIN_SECONDS: Final = 0.5
"""Seconds between two requests for a snapshot of the same peer."""
_AHEAD_KEPT: Final = 1000
"""Bound on the batches that wait for a missing one: those of 20 s. A further batch is dropped, and so missing, too."""
_OLDEST: Final = 86_400.0
"""Seconds before now that an event may have. An earlier one is moved there; reservations expire sooner than that."""
_OK: Final = 200
"""The status of each response of an engine to a peer: the peer has dealt with errors itself."""


class PeerRequest(Protocol):
    """The reservations of a peer's attempt. Every call may come repeatedly, late or not at all."""

    def prefill_answered(self, status: int, now: float) -> None: ...
    def first_byte(self, status: int, now: float) -> None: ...
    def end(self, now: float) -> None: ...


Heed = Callable[[AnyNotice, float], object]
"""Takes a notice of a peer, and its time on this replica's clock."""


def _ignore(_notice: AnyNotice, _at: float) -> None:
    """Ignore a notice, where nothing depends on it."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """The state of one peer, as this replica sees it."""

    replica: str
    age: float
    """Seconds since its last message."""
    requests: int
    """Requests of the peer that hold reservations here."""
    in_doubt: bool
    """Whether a batch of it is missing."""


class _Peer:
    """The messages and the open attempts of one peer."""

    def __init__(self, now: float) -> None:
        self.last_message_at = now
        self.applied = 0
        """Sequence number of the last batch that is applied to :attr:`attempts`."""
        self.ahead: dict[int, tuple[Batch, float]] = {}
        """Batches that wait for a missing one, with the difference of the two clocks in seconds."""
        self.attempts: dict[int, tuple[PeerRequest, float]] = {}
        """Open attempts, with the moment at which each was placed."""
        self.request_at = now + FIRST_REQUEST_SECONDS
        """When to request the next snapshot, if a batch is missing then."""
        self.parts_of = 0
        """Sequence number of the snapshot whose parts are collected."""
        self.parts: dict[int, Snapshot] = {}


class Peers:
    """Apply the messages of all peers to reservations of this replica."""

    def __init__(
        self,
        open_peer: Callable[[PlacementRecord, float], PeerRequest],
        peer_timeout: float,
        heed: Heed = _ignore,
    ) -> None:
        """Begin without peers.

        *open_peer* opens the reservations of an attempt; the timeout is in seconds; *heed* takes notices.
        """
        self._open_peer = open_peer
        self._heed = heed
        self._peer_timeout = peer_timeout
        self._peers: dict[str, _Peer] = {}
        self.anomalies: Counter[str] = Counter(duplicate=0, gap=0, snapshot=0, unknown_request=0, peer_timeout=0)
        """How often each happened: ``duplicate`` batches; ``gap``, where batches are missing, and the ``snapshot`` that
        closed it; ``unknown_request``, events of unknown attempts; ``peer_timeout``, peers that are gone."""

    def batch(self, batch: Batch, now: float) -> None:
        """Apply a batch of a peer, or keep it until the batches before it are there."""
        peer = self._peer_of(batch.replica, now)
        if batch.sequence <= peer.applied or batch.sequence in peer.ahead:
            self.anomalies["duplicate"] += 1
            return
        if batch.sequence > peer.applied + 1 and not peer.ahead:
            if peer.applied:  # else the batches before are older than this connection
                self.anomalies["gap"] += 1
            peer.request_at = now + FIRST_REQUEST_SECONDS
        if len(peer.ahead) < _AHEAD_KEPT:
            peer.ahead[batch.sequence] = (batch, now - batch.now)
        self._apply_following(peer, now)

    def snapshot(self, snapshot: Snapshot, now: float) -> None:
        """Keep a part of a snapshot; with the last part, apply the whole snapshot."""
        peer = self._peer_of(snapshot.replica, now)
        if snapshot.sequence <= peer.applied or snapshot.sequence < peer.parts_of:
            return  # it is applied already, or its other parts were overtaken by a newer one
        if snapshot.sequence > peer.parts_of:
            peer.parts_of = snapshot.sequence
            peer.parts.clear()
        peer.parts[snapshot.part] = snapshot
        if len(peer.parts) < snapshot.parts:
            return
        events = [event for part in sorted(peer.parts) for event in peer.parts[part].events]
        notices = [notice for each in peer.parts.values() for notice in each.notices]
        peer.parts.clear()
        self.anomalies["snapshot"] += 1
        still_open = {event.attempt for event in events}
        for attempt in peer.attempts.keys() - still_open:
            peer.attempts.pop(attempt)[0].end(now)
        self._apply(peer, events, now - snapshot.now, now)
        self._apply_notices(notices, now - snapshot.now, now)
        peer.applied = snapshot.sequence
        peer.ahead = {sequence: ahead for sequence, ahead in peer.ahead.items() if sequence > peer.applied}
        self._apply_following(peer, now)

    def review(self, now: float) -> list[str]:
        """Forget peers that are gone, and return those to request a snapshot of. Call it every few milliseconds."""
        missing = []
        for replica, peer in list(self._peers.items()):
            if now - peer.last_message_at >= self._peer_timeout:
                self.anomalies["peer_timeout"] += 1
                self.forget(replica, now)
            elif peer.ahead and now >= peer.request_at:
                peer.request_at = now + REQUEST_AGAIN_SECONDS
                missing.append(replica)
        return missing

    def forget(self, replica: str, now: float) -> None:
        """End all attempts of a peer."""
        if (peer := self._peers.pop(replica, None)) is not None:
            for attempt, _ in peer.attempts.values():
                attempt.end(now)

    def status(self, now: float) -> list[PeerStatus]:
        return [
            PeerStatus(replica, now - peer.last_message_at, len(peer.attempts), in_doubt=bool(peer.ahead))
            for replica, peer in self._peers.items()
        ]

    def _peer_of(self, replica: str, now: float) -> _Peer:
        peer = self._peers.get(replica)
        if peer is None:
            peer = self._peers[replica] = _Peer(now)
        peer.last_message_at = now
        return peer

    def _apply_following(self, peer: _Peer, now: float) -> None:
        """Apply the batches that are ahead, up to the next missing one."""
        while (following := peer.ahead.pop(peer.applied + 1, None)) is not None:
            batch, offset = following
            peer.applied = batch.sequence
            self._apply(peer, batch.events, offset, now)
            self._apply_notices(batch.notices, offset, now)

    def _apply(self, peer: _Peer, events: Sequence[Event], offset: float, now: float) -> None:
        """Apply events to the reservations.

        Args:
            peer: The sender of the events.
            events: In their order.
            offset: Seconds to add to readings of the peer's clock; the message's time on the way is in it.
            now: The present time. Events are moved, if need be: none is later or a day earlier than now, and none is
                before its attempt was placed.
        """
        for event in events:
            at = _moved(event.at, offset, now)
            opened = peer.attempts.get(event.attempt)
            if isinstance(event, Placed):
                if opened is None:
                    peer.attempts[event.attempt] = (self._open_peer(event.record, at), at)
                continue
            if opened is None:
                self.anomalies["unknown_request"] += 1
                continue
            attempt, begun = opened
            at = max(at, begun)
            match event:
                case PrefillAnswered():
                    attempt.prefill_answered(_OK, at)
                case FirstToken():
                    attempt.first_byte(_OK, at)
                case Ended():
                    del peer.attempts[event.attempt]
                    attempt.end(at)
                case _:
                    assert_never(event)

    def _apply_notices(self, notices: Sequence[Raw], offset: float, now: float) -> None:
        for notice in read_notices(notices):
            self._heed(notice, _moved(notice.at, offset, now))


def _moved(at: float, offset: float, now: float) -> float:
    """Convert a reading of a peer's clock, which may be at most a day before now."""
    return min(now, max(now - _OLDEST, at + offset))
