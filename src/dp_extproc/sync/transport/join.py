"""From the configuration to a replica among others."""

from collections.abc import Callable
from pathlib import Path

from dp_extproc.config.sync import SyncSettings
from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.peers import PeerRequest
from dp_extproc.sync.transport.bus import Bus
from dp_extproc.sync.transport.replica import Replica
from dp_extproc.sync.transport.unix_bus import UnixBus


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
