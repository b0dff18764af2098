"""The examples of autoscaling are valid, ask for series that a running service has, and fit the examples of engines."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.chart import ROOT, VERSIONS, Object, parse, problems
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

AUTOSCALING = ROOT / "deploy/autoscaling"
SERIES = re.compile(r"\b(dp_extproc_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z]+)="([^"]*)"')


def objects_of(name: str) -> tuple[Object, ...]:
    return parse((AUTOSCALING / name).read_text(encoding="utf-8"))


def adapter_rule() -> dict[str, Any]:
    (values,) = objects_of("prometheus-adapter.yaml")
    (rule,) = values["rules"]["external"]
    found: dict[str, Any] = rule
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Find every PromQL expression, with the file that has it. The adapter's template is filled as for the HPAs."""
    rule = adapter_rule()
    yield "prometheus-adapter", rule["seriesQuery"]
    for role in ("prefill", "decode"):
        yield "prometheus-adapter", rule["metricsQuery"].replace("<<.LabelMatchers>>", f'role="{role}"')
    for item in objects_of("keda.yaml"):
        yield "keda", item["spec"]["triggers"][0]["metadata"]["query"]
    for group in objects_of("alerts.yaml")[0]["groups"]:
        for each in group["rules"]:
            yield "alerts", each["expr"]


@pytest.fixture(scope="module")
def series() -> set[tuple[str, str, str]]:
    """All series of a running service with a pool and a role: the name, the pool and the role."""
    with EngineProcess("prefill", 2) as prefill, EngineProcess("decode", 2) as decode:
        pool = {"models": ["*"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [decode.url]}}
        with ServiceProcess(write_config([pool])) as service:
            service.wait_until_fresh()
            return {
                (sample.name, sample.labels["pool"], sample.labels["role"])
                for family in text_string_to_metric_families(service.metrics())
                for sample in family.samples
                if "role" in sample.labels
            }


@pytest.mark.parametrize(("file", "query"), [*queries()])
def test_expressions_find_series_of_a_running_service(file: str, query: str, series: set[tuple[str, str, str]]) -> None:
    """An autoscaler that finds nothing does nothing, which is noticed only when it is needed."""
    found = SERIES.findall(query)
    assert found
    for name, selector in found:
        matchers = dict(MATCHER.findall(selector))
        assert matchers.keys() <= {"pool", "role"}
        assert any(
            name == each and matchers.get("pool", pool) == pool and matchers.get("role", role) == role
            for each, pool, role in series
        )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["hpa.yaml", "keda.yaml"])
def test_autoscalers_match_the_schemas_of_kubernetes(name: str, version: str) -> None:
    """Every key exists in every supported release, and in KEDA's resource."""
    objects = objects_of(name)
    assert len(objects) == 2
    assert [found for item in objects if (found := problems(item, version))] == []


@pytest.mark.parametrize("name", ["hpa.yaml", "keda.yaml"])
def test_autoscalers_take_the_number_of_engines_as_it_is(name: str) -> None:
    """Each scales the engines of its own role, never to zero, and by a target that does not multiply the number."""
    engines = {
        (item["apiVersion"], item["kind"], item["metadata"]["name"])
        for item in parse((ROOT / "deploy/examples/sglang.yaml").read_text(encoding="utf-8"))
    }
    roles = []
    for item in objects_of(name):
        spec = item["spec"]
        target = spec["scaleTargetRef"]
        assert (target["apiVersion"], target["kind"], target["name"]) in engines
        assert spec.get("minReplicas", spec.get("minReplicaCount")) == 1
        if item["kind"] == "ScaledObject":
            (trigger,) = spec["triggers"]
            assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "1")
            assert trigger["metadata"]["ignoreNullValues"] == "false"
            role = dict(MATCHER.findall(trigger["metadata"]["query"]))["role"]
        else:
            (metric,) = spec["metrics"]
            assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
            assert metric["external"]["metric"]["name"] == adapter_rule()["name"]["as"]
            role = metric["external"]["metric"]["selector"]["matchLabels"]["role"]
        assert target["name"].endswith(role)
        roles.append(role)
    assert roles == ["prefill", "decode"]


def test_queries_take_the_maximum_of_replicas() -> None:
    """Each replica and each worker process reports the whole, and HPA adds up all series that it gets."""
    of_autoscalers = [query for file, query in queries() if file in {"keda", "prometheus-adapter"}][1:]
    assert len(of_autoscalers) == 4
    assert all(query.startswith("ceil(max") and "sum" not in query for query in of_autoscalers)


def test_documentation_shows_the_files_as_they_are() -> None:
    """The page links every file of the folder."""
    page = (ROOT / "docs/autoscaling.md").read_text(encoding="utf-8")
    assert {path.name for path in AUTOSCALING.iterdir()} == set(re.findall(r"deploy/autoscaling/([a-z-]+\.yaml)", page))
    assert yaml.safe_load(Path(AUTOSCALING / "alerts.yaml").read_text(encoding="utf-8"))
