"""What the other replicas have on their books, kept true over a bus that may lose, repeat and reorder. Pure.

Rule 1: batches of a peer are applied in the order of their sequence numbers, each once. One that is ahead waits.
Rule 2: while something is missing, the peer is asked for a snapshot: all that it has open after a certain batch.
Rule 3: a snapshot replaces what is known of the peer. What it does not know has ended.
Rule 4: a peer that is silent for a while is gone, and all it had on its books with it. If it speaks again, it is new.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import Batch, Dispatched, Ended, Event, FirstToken, PrefillAnswered, Snapshot

FIRST_ASK: Final = 0.05
"""Seconds for what is missing to come by itself: late, or as the answer to somebody else."""
ASK_AGAIN: Final = 0.5
_AHEAD_KEPT: Final = 1000
"""Batches that wait for a missing one: what a replica tells in 20 s. Any more are missing, too, then."""
_OLDEST: Final = 86_400.0
"""Seconds before now; what is told of an earlier moment is told of this one. The books give up any attempt sooner."""
_OK: Final = 200
"""A peer has judged the answers of its engines itself; none of them teaches us anything."""


class PeerRequest(Protocol):
    """An attempt of a peer on our books. Every call may come repeatedly, late or not at all."""

    def prefill_answered(self, status: int, now: float) -> None: ...
    def first_byte(self, status: int, now: float) -> None: ...
    def end(self, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One other replica, as it looks from here."""

    replica: str
    age: float
    """Seconds since it was heard."""
    requests: int
    """Requests of the peer that hold reservations here."""
    in_doubt: bool
    """Whether something of it is missing."""


class _Peer:
    """What is known of one replica."""

    __slots__ = ("ahead", "applied", "ask_at", "attempts", "heard", "parts", "parts_of")

    def __init__(self, now: float) -> None:
        self.heard = now
        self.applied = 0
        """Sequence number of the last batch that is in :attr:`attempts`."""
        self.ahead: dict[int, tuple[Batch, float]] = {}
        """Batches that wait for one before them, with the difference of the clocks."""
        self.attempts: dict[int, tuple[PeerRequest, float]] = {}
        """Open ones, with the moment of the dispatch."""
        self.ask_at = now + FIRST_ASK
        self.parts_of = 0
        """Sequence number of the snapshot that is being put together."""
        self.parts: dict[int, Sequence[Event]] = {}

    @property
    def in_doubt(self) -> bool:
        return bool(self.ahead)


class Peers:
    """All other replicas."""

    def __init__(self, open_foreign: Callable[[PlacementRecord, float], PeerRequest], silence: float) -> None:
        """Begin without any.

        Args:
            open_foreign: Puts an attempt on our books.
            silence: Seconds after which a peer that says nothing is gone.
        """
        self._open_foreign = open_foreign
        self._silence = silence
        self._peers: dict[str, _Peer] = {}
        self.anomalies: Counter[str] = Counter(duplicate=0, gap=0, snapshot=0, unknown_request=0, peer_timeout=0)
        """What went otherwise than it should: ``repeated`` messages; ``gaps`` of missing ones, and the ``snapshots``
        that closed them; ``strays``, events of attempts that are not known; peers that fell silent."""

    def batch(self, batch: Batch, now: float) -> None:
        """Take in what a peer has told."""
        peer = self._hear(batch.replica, now)
        if batch.sequence <= peer.applied or batch.sequence in peer.ahead:
            self.anomalies["duplicate"] += 1
            return
        if batch.sequence > peer.applied + 1 and not peer.ahead:
            if peer.applied:  # else it is merely older than our acquaintance
                self.anomalies["gap"] += 1
            peer.ask_at = now + FIRST_ASK
        if len(peer.ahead) < _AHEAD_KEPT:
            peer.ahead[batch.sequence] = (batch, now - batch.now)
        self._go_on(peer, now)

    def snapshot(self, snapshot: Snapshot, now: float) -> None:
        """Take in a part of what a peer has open; with the last part, the whole."""
        peer = self._hear(snapshot.replica, now)
        if snapshot.sequence <= peer.applied or snapshot.sequence < peer.parts_of:
            return  # it is known already, or its rest was overtaken by a newer one
        if snapshot.sequence > peer.parts_of:
            peer.parts_of = snapshot.sequence
            peer.parts.clear()
        peer.parts[snapshot.part] = snapshot.events
        if len(peer.parts) < snapshot.parts:
            return
        events = [event for part in sorted(peer.parts) for event in peer.parts[part]]
        peer.parts.clear()
        self.anomalies["snapshot"] += 1
        known = {event.attempt for event in events}
        for attempt in peer.attempts.keys() - known:
            peer.attempts.pop(attempt)[0].end(now)
        self._apply(peer, events, now - snapshot.now, now)
        peer.applied = snapshot.sequence
        for sequence in [sequence for sequence in peer.ahead if sequence <= peer.applied]:
            del peer.ahead[sequence]
        self._go_on(peer, now)

    def review(self, now: float) -> list[str]:
        """Let go of peers that are silent, and name those to be asked for a snapshot. Call it every few moments."""
        for replica in [replica for replica, peer in self._peers.items() if now - peer.heard >= self._silence]:
            self.anomalies["peer_timeout"] += 1
            self.forget(replica, now)
        missing = [replica for replica, peer in self._peers.items() if peer.in_doubt and now >= peer.ask_at]
        for replica in missing:
            self._peers[replica].ask_at = now + ASK_AGAIN
        return missing

    def forget(self, replica: str, now: float) -> None:
        """Take all that a peer had on its books off ours."""
        if (peer := self._peers.pop(replica, None)) is not None:
            for attempt, _ in peer.attempts.values():
                attempt.end(now)

    def status(self, now: float) -> list[PeerStatus]:
        """Tell of each peer."""
        return [
            PeerStatus(replica, now - peer.heard, len(peer.attempts), peer.in_doubt)
            for replica, peer in self._peers.items()
        ]

    def _hear(self, replica: str, now: float) -> _Peer:
        peer = self._peers.get(replica)
        if peer is None:
            peer = self._peers[replica] = _Peer(now)
        peer.heard = now
        return peer

    def _go_on(self, peer: _Peer, now: float) -> None:
        while (following := peer.ahead.pop(peer.applied + 1, None)) is not None:
            batch, offset = following
            peer.applied = batch.sequence
            self._apply(peer, batch.events, offset, now)

    def _apply(self, peer: _Peer, events: Sequence[Event], offset: float, now: float) -> None:
        """Apply events to the books.

        Args:
            peer: Whose they are.
            events: In their order.
            offset: Of our clock from the peer's, as the message showed it. Its way took time, and not always the same.
            now: No event is later, none is a day earlier, and none is before the dispatch of its attempt.
        """
        for event in events:
            at = min(now, max(now - _OLDEST, event.at + offset))
            known = peer.attempts.get(event.attempt)
            if isinstance(event, Dispatched):
                if known is None:
                    peer.attempts[event.attempt] = (self._open_foreign(event.dispatch, at), at)
                continue
            if known is None:
                self.anomalies["unknown_request"] += 1
                continue
            attempt, begun = known
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
