"""The dashboard queries only series that a running router has, and shows all of them."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

OBSERVE = Path(__file__).parents[2] / "deploy/observe"
DASHBOARD: dict[str, Any] = json.loads((OBSERVE / "grafana/dashboards/dp-extproc.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SELECTOR = re.compile(r"\b((?:dp_extproc|envoy)_[a-z_]+)\{([^}]*)\}")
LABEL = re.compile(r"([a-z_]+)(?:=~|!~|!=|=)")
OF_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus adds to every target."""


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Names of all series of the service and of Envoy after one request, with the names of their labels."""
    with EngineProcess("prefill", 2) as prefill, EngineProcess("decode", 2) as decode:
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [prefill.url]},
            "decode": {"endpoints": [decode.url]},
        }
        with ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:
            service.wait_until_fresh()
            service.wait_until_ready()
            body = {"prompt": "hello", "max_tokens": 4, "model": "any"}
            loopback.CLIENT.post(f"{envoy.url}/v1/completions", json=body).raise_for_status()
            pages = service.metrics() + loopback.CLIENT.get(f"{envoy.admin_url}/stats/prometheus").text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(pages):
        counted = family.name + ("_total" if family.type == "counter" and family.name.startswith("dp_") else "")
        found.setdefault(counted, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_queries_existing_series(query: str, series: dict[str, set[str]]) -> None:
    """A renamed metric leaves an empty panel, which looks like good news."""
    selectors = SELECTOR.findall(query)
    assert selectors
    for name, labels in selectors:
        assert name in series
        if series[name]:  # a counter of failures has no labels before the first failure
            assert set(LABEL.findall(labels)) <= series[name] | OF_PROMETHEUS


def test_dashboard_uses_the_provisioned_data_source() -> None:
    """The data source of the panels is the provisioned one, and no panel covers another."""
    (source,) = yaml.safe_load((OBSERVE / "grafana/datasources/prometheus.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    used = {each["datasource"]["uid"] for panel in DASHBOARD["panels"] for each in (panel, *panel["targets"])} | {
        variable["datasource"]["uid"] for variable in DASHBOARD["templating"]["list"]
    }
    assert used == {source["uid"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = sorted(
        (y, x, panel["gridPos"]["w"])
        for panel in DASHBOARD["panels"]
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        for x in (panel["gridPos"]["x"],)
    )
    assert all(x + width <= 24 for _, x, width in places)
    assert all(x + width <= other for (y, x, width), (same, other, _) in pairwise(places) if y == same)


def test_every_panel_has_a_description() -> None:
    """From a title alone the reader cannot see which values are good."""
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    assert [panel["title"] for panel in DASHBOARD["panels"] if not panel["description"]] == []


def test_prometheus_reads_every_target_by_name() -> None:
    """Each target has its job and page, by a name that is resolved again when containers change their addresses."""
    document = yaml.safe_load((OBSERVE / "prometheus.yml").read_text(encoding="utf-8"))
    found = {
        job["job_name"]: (job.get("metrics_path", "/metrics"), source["names"], source["port"])
        for job in document["scrape_configs"]
        for source in job["dns_sd_configs"]
    }
    assert found == {
        "dp-extproc": ("/metrics", ["dp-extproc", "dp-extproc-baseline"], 9090),
        "envoy": ("/stats/prometheus", ["envoy", "envoy-baseline"], 9901),
        "engines": ("/metrics", ["prefill", "decode"], 30000),
    }
