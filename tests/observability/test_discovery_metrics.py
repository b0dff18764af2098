"""The metrics of the sources of endpoints."""

from dp_extproc.engines.model import Role, SourceKind
from dp_extproc.fleet.discovery.roster import Place, RoleSource, Roster
from dp_extproc.load.cache import LoadCache
from dp_extproc.observability.discovery_metrics import DiscoveryMetrics
from fleet.discovery.test_roster import SILENT


def test_sources_of_one_name_are_one_series() -> None:
    """Engines on two ports of one name are two sources, and Prometheus drops a series that is there twice."""
    roster = Roster(lambda _endpoint: True)
    place = Place("m", Role.DECODE)
    roster.configure([RoleSource(port, place, SourceKind.DNS, "dns decode", 30.0, SILENT) for port in (1, 2)], 0.0)
    roster.failed(1, "no answer", 10.0)
    roster.failed(2, "no answer", 5.0)
    roster.failed(2, "no answer", 6.0)

    found = [
        (sample.name, sample.labels, sample.value)
        for metric in DiscoveryMetrics(LoadCache((), 5.0), roster, lambda: 11.0).collect()
        for sample in metric.samples
        if sample.name != "dp_extproc_endpoints"
    ]
    labels = {"pool": "m", "role": "decode", "source": "dns", "name": "dns decode"}
    assert found == [
        ("dp_extproc_source_failures_total", labels, 3.0),
        ("dp_extproc_source_age_seconds", labels, 6.0),
    ]
