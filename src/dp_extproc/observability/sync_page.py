"""What the admin port tells of the exchange between replicas."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dp_extproc.sync.replica import SyncStatus


def describe_sync(status: SyncStatus) -> dict[str, Any]:
    """Describe the exchange for /loads. Times are ages in seconds."""
    page = asdict(status)
    for peer in page["peers"]:
        peer["age"] = round(peer["age"], 3)
    return page


class SyncMetrics:
    """Collects for /metrics."""

    def __init__(self, status: Callable[[], SyncStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Read the status."""
        status = self._status()
        yield GaugeMetricFamily("dp_extproc_sync_connected", "1 while the bus works.", value=status.connected)
        yield GaugeMetricFamily("dp_extproc_sync_peers", "Other replicas that are heard.", value=len(status.peers))
        yield GaugeMetricFamily(
            "dp_extproc_sync_foreign_attempts",
            "Requests of other replicas on the books.",
            value=sum(peer.attempts for peer in status.peers),
        )
        messages = CounterMetricFamily("dp_extproc_sync_messages", "Messages between replicas.", labels=["kind"])
        for kind, count in (("sent", status.sent), ("received", status.received), ("lost", status.lost)):
            messages.add_metric([kind], count)
        yield messages
        troubles = CounterMetricFamily(
            "dp_extproc_sync_troubles", "What went otherwise than it should on the bus.", labels=["kind"]
        )
        for kind, count in status.counts.items():
            troubles.add_metric([kind], count)
        yield troubles
