"""One replica among others: ties what it tells and what it hears to a bus and a clock."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from dp_extproc.config.sync import SyncSettings
from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import Ask, Batch, Message, Snapshot, Unreadable, decode
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.peers import PeerRequest, Peers, PeerStatus
from dp_extproc.sync.transport.bus import Bus
from dp_extproc.sync.transport.unix_bus import UnixBus

BEAT: Final = 0.02
"""Seconds that an event waits at most. Told within 10 ms, two replicas place as well as one; within 50 ms, nearly."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """How the exchange with the other replicas goes."""

    replica: str
    """Our own name."""
    connected: bool
    peers: list[PeerStatus]
    sent: int
    """Messages given to the bus; ``lost`` ones included."""
    received: int
    """Of others."""
    lost: int
    """That the bus did not take."""
    anomalies: dict[str, int]
    """What went otherwise than it should; see :attr:`dp_extproc.sync.peers.Peers.anomalies`. Messages that are
    ``undecodable`` or have a ``version_mismatch`` come on top, and those that could be read but not be applied
    (``unapplied``)."""
    last_error: str | None
    """Why the bus was lost the last time."""


class Replica:
    """Tells its peers what it sends, and keeps what they send on the books. Implements ``Listener`` of a bus."""

    def __init__(
        self,
        outbox: Outbox,
        bus: Bus,
        open_foreign: Callable[[PlacementRecord, float], PeerRequest],
        *,
        clock: Callable[[], float],
        silence: float,
    ) -> None:
        """Set up.

        Args:
            outbox: Is told of our own attempts.
            bus: Between the replicas.
            open_foreign: Puts an attempt of a peer on our books.
            clock: Monotonic seconds; the clock of the moments that the outbox is told.
            silence: Seconds after which a peer that says nothing is gone.
        """
        self._outbox = outbox
        self._bus = bus
        self._peers = Peers(open_foreign, silence)
        self._clock = clock
        self._connected = False
        self._last_error: str | None = None
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
        """Tell how it goes."""
        return SyncStatus(
            replica=self._outbox.replica,
            connected=self._connected,
            peers=self._peers.status(self._clock()),
            sent=self._sent,
            received=self._received,
            lost=self._bus.lost,
            anomalies={**self._peers.anomalies, **self._counts},
            last_error=self._last_error,
        )

    # --- the bus calls these ---

    def up(self) -> None:
        if self._last_error is None:
            _log.info("sync: connected, as replica %s", self._outbox.replica)
        else:
            _log.warning("sync: the bus is back; asking the others what they have on their books")
        self._connected = True
        self._outbox.ask(None)
        self._outbox.answer()  # they have missed us as we have missed them

    def down(self, reason: str) -> None:
        if self._connected or self._last_error is None:
            _log.warning("sync: no bus (%s); placing without knowing what the other replicas send", reason)
        self._connected = False
        self._last_error = reason

    def receive(self, message: bytes) -> None:
        told = decode(message)
        if isinstance(told, Unreadable):
            self._refuse(told)
            return
        if told.replica == self._outbox.replica:
            return  # our own echo
        self._received += 1
        now = self._clock()
        try:
            self._take_in(told, now)
        except Exception as error:  # noqa: BLE001 - requests are served without the others' books, too; nothing here may stop that
            self._unapplied(told.replica, error)
            self._peers.forget(told.replica, now)

    def _take_in(self, told: Message, now: float) -> None:
        match told:
            case Batch():
                self._peers.batch(told, now)
            case Snapshot():
                self._peers.snapshot(told, now)
            case Ask():
                if told.of is None or told.of == self._outbox.replica:
                    self._outbox.answer()
            case _:
                assert_never(told)

    def _unapplied(self, replica: str, error: Exception) -> None:
        """Count what could be read, and yet not be applied; one traceback of each kind tells enough."""
        self._counts["unapplied"] += 1
        if type(error) not in self._logged:
            self._logged.add(type(error))
            _log.error(
                "sync: a message of replica %.40s could not be applied; all of it is left out, and counted; this is a "
                "fault of dp-extproc, please report it with what follows",
                replica,
                exc_info=error,
            )

    def _refuse(self, reason: Unreadable) -> None:
        self._counts[reason.value] += 1
        if self._counts[reason.value] == 1:
            _log.warning("sync: something on the bus is %s; it is left out, and counted", _EXPLAINED[reason])

    def _beat(self) -> None:
        now = self._clock()
        for replica in self._peers.review(now):
            self._outbox.ask(replica)
        for message in self._outbox.collect(now):
            self._bus.send(message)
            self._sent += 1


def join(
    settings: SyncSettings,
    outbox: Outbox,
    open_foreign: Callable[[PlacementRecord, float], PeerRequest],
    *,
    clock: Callable[[], float],
) -> Replica:
    """Make the replica that the configuration describes. It takes part once it runs.

    Args:
        settings: The bus.
        outbox: Is told of our own attempts.
        open_foreign: Puts an attempt of another replica on our books.
        clock: Monotonic seconds; the clock of the moments that the outbox is told.
    """
    bus: Bus
    if settings.directory is not None:
        bus = UnixBus(Path(settings.directory), outbox.replica)
    else:
        from dp_extproc.sync.transport.redis_bus import RedisBus  # noqa: PLC0415 - slow to import, and most have no Redis

        bus = RedisBus(settings.url.get_secret_value(), settings.channel, settings.peer_timeout)
    return Replica(outbox, bus, open_foreign, clock=clock, silence=settings.peer_timeout)


_EXPLAINED: Final = {
    Unreadable.UNDECODABLE: "not of this service: do others use the same channel?",
    Unreadable.VERSION_MISMATCH: "of another version of this service: replicas hear only those of their own",
}
