"""One replica in the exchange of in-flight requests: its outbox and its peers, connected to a bus and a clock."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from dp_extproc.config.sync import SyncSettings
from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import Batch, Message, Snapshot, SnapshotRequest, Unreadable, decode
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.peers import Heed, PeerRequest, Peers, PeerStatus
from dp_extproc.sync.transport.bus import Bus
from dp_extproc.sync.transport.unix_bus import UnixBus

BEAT: Final = 0.02
"""Seconds that an event waits at most. With 10 ms two replicas schedule as well as one; with 50 ms nearly so."""
_EXPLAINED: Final = {
    Unreadable.UNDECODABLE: "not of this service: do others use the same channel?",
    Unreadable.VERSION_MISMATCH: "of another version of this service: replicas hear only those of their own",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """The state of the exchange with the other replicas."""

    replica: str
    """Name of this replica."""
    connected: bool
    peers: list[PeerStatus]
    sent: int
    """Messages given to the bus, with those that were lost."""
    received: int
    """Messages of peers."""
    lost: int
    """Messages that the bus did not send."""
    anomalies: dict[str, int]
    """Those of :attr:`dp_extproc.sync.peers.Peers.anomalies`; messages that are ``undecodable`` or have a
    ``version_mismatch``; and messages that were decoded, but not applied (``unapplied``)."""
    last_error: str | None
    """Why the bus failed the last time."""
    problem: str | None
    """Why some replicas do not get messages at present; None if all of them do."""


class Replica:
    """Publishes the attempts of this replica, and follows those of its peers. Implements ``Listener`` of a bus."""

    def __init__(
        self,
        outbox: Outbox,
        bus: Bus,
        open_peer: Callable[[PlacementRecord, float], PeerRequest],
        *,
        heed: Heed,
        clock: Callable[[], float],
        peer_timeout: float,
    ) -> None:
        """Connect the parts.

        Args:
            outbox: Listens to the attempts of this replica.
            bus: Between the replicas.
            open_peer: Opens the reservations of a peer's attempt.
            heed: Takes the notices of peers.
            clock: Monotonic seconds, as in the events of the outbox.
            peer_timeout: Seconds without a message after which a peer is gone.
        """
        self._outbox = outbox
        self._bus = bus
        self._peers = Peers(open_peer, peer_timeout, heed)
        self._clock = clock
        self._connected = False
        self._last_error: str | None = None
        self._problem: str | None = None
        """The problem of the bus that was logged last."""
        self._sent = 0
        self._received = 0
        self._counts: Counter[str] = Counter({**{reason.value: 0 for reason in Unreadable}, "unapplied": 0})
        self._logged: set[type[Exception]] = set()

    async def run(self) -> None:
        """Take part until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._bus.run(self))
                while True:
                    self._beat()
                    await asyncio.sleep(BEAT)
        finally:
            self._connected = False

    def status(self) -> SyncStatus:
        return SyncStatus(
            replica=self._outbox.replica,
            connected=self._connected,
            peers=self._peers.status(self._clock()),
            sent=self._sent,
            received=self._received,
            lost=self._bus.lost,
            anomalies={**self._peers.anomalies, **self._counts},
            last_error=self._last_error,
            problem=self._bus.problem,
        )

    # --- the bus calls these ---

    def up(self) -> None:
        if self._last_error is None:
            _log.info("sync: connected, as replica %s", self._outbox.replica)
        else:
            _log.warning("sync: the bus is back; requesting the open attempts of all peers")
        self._connected = True
        self._outbox.request_snapshot(None)
        self._outbox.send_snapshot()  # peers have missed messages, too

    def down(self, reason: str) -> None:
        if self._connected or self._last_error is None:
            _log.warning("sync: no bus (%s); placing without knowing what the other replicas send", reason)
        self._connected = False
        self._last_error = reason

    def receive(self, data: bytes) -> None:
        message = decode(data)
        if isinstance(message, Unreadable):
            self._unreadable(message)
            return
        if message.replica == self._outbox.replica:
            return  # an echo of this replica
        self._received += 1
        now = self._clock()
        try:
            self._apply(message, now)
        except Exception as error:  # noqa: BLE001 - requests are served without the load of peers, too
            self._unapplied(message.replica, error)
            self._peers.forget(message.replica, now)

    def _apply(self, message: Message, now: float) -> None:
        match message:
            case Batch():
                self._peers.batch(message, now)
            case Snapshot():
                self._peers.snapshot(message, now)
            case SnapshotRequest():
                if message.of is None or message.of == self._outbox.replica:
                    self._outbox.send_snapshot()
            case _:
                assert_never(message)

    def _unapplied(self, replica: str, error: Exception) -> None:
        """Count a message that was decoded, but not applied; log one traceback for each kind of error."""
        self._counts["unapplied"] += 1
        if type(error) not in self._logged:
            self._logged.add(type(error))
            _log.error(
                "sync: a message of replica %.40s could not be applied; all of it is left out, and counted; this is a "
                "fault of dp-extproc, please report it with what follows",
                replica,
                exc_info=error,
            )

    def _unreadable(self, reason: Unreadable) -> None:
        self._counts[reason.value] += 1
        if self._counts[reason.value] == 1:
            _log.warning("sync: something on the bus is %s; it is left out, and counted", _EXPLAINED[reason])

    def _beat(self) -> None:
        now = self._clock()
        for replica in self._peers.review(now):
            self._outbox.request_snapshot(replica)
        for message in self._outbox.collect(now):
            self._bus.send(message)
            self._sent += 1
        if self._bus.problem != self._problem:
            self._problem = self._bus.problem
            if self._problem is None:
                _log.info("sync: all replicas get messages again")
            else:
                _log.warning(
                    "sync: some replicas get no messages, and schedule without the load of this one: %s; all processes "
                    "need the same user and access to the directory",
                    self._problem,
                )


def join(
    settings: SyncSettings,
    outbox: Outbox,
    open_peer: Callable[[PlacementRecord, float], PeerRequest],
    *,
    heed: Heed,
    clock: Callable[[], float],
) -> Replica:
    """Make the replica that the configuration describes; see :class:`Replica`. It takes part once it runs."""
    bus: Bus
    if settings.directory is not None:
        bus = UnixBus(Path(settings.directory), outbox.replica)
    else:
        from dp_extproc.sync.transport.redis_bus import RedisBus  # noqa: PLC0415 - slow to import, and most have no Redis

        bus = RedisBus(settings.url.get_secret_value(), settings.channel, settings.peer_timeout)
    return Replica(outbox, bus, open_peer, heed=heed, clock=clock, peer_timeout=settings.peer_timeout)
