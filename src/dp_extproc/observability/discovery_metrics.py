"""Prometheus metrics of discovery: endpoints by state, and how the sources of endpoints report."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dp_extproc.fleet.discovery.roster import Report, Roster
from dp_extproc.load.cache import LoadCache
from dp_extproc.observability.endpoint_states import count_states


class DiscoveryMetrics:
    """Reads the roster and the load cache whenever Prometheus scrapes."""

    def __init__(self, loads: LoadCache, roster: Roster, clock: Callable[[], float]) -> None:
        self._loads = loads
        self._roster = roster
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        now = self._clock()
        endpoints = GaugeMetricFamily(
            "dp_extproc_endpoints",
            "Endpoints by state: joining, ready, not_ready, suspect, stale, draining.",
            labels=["pool", "role", "source", "state"],
        )
        for place, count in count_states(self._loads, self._roster, now).items():
            endpoints.add_metric(place, count)
        yield endpoints
        labels = ["pool", "role", "source", "name"]
        failures = CounterMetricFamily(
            "dp_extproc_source_failures", "Failed tries of a source of endpoints.", labels=labels
        )
        ages = GaugeMetricFamily(
            "dp_extproc_source_age_seconds",
            "Age of the endpoints of a source: 0 while it reports, else the seconds since it began to fail.",
            labels=labels,
        )
        found: dict[tuple[str, str, str, str], list[Report]] = {}
        for key, source in self._roster.sources.items():
            if source.source is not None:
                names = (source.place.pool, source.place.role.value, source.kind.value, source.name)
                found.setdefault(names, []).append(self._roster.reports[key])
        for names, reports in found.items():  # two ports of one name are two sources, and series must not be repeated
            failures.add_metric(names, sum(report.failures for report in reports))
            ages.add_metric(names, max(report.age(now) for report in reports))
        yield from (failures, ages)
