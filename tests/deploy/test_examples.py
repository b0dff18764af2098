"""The examples of engines are valid, and the chart's first values find them."""

import re
from pathlib import Path

import pytest
import yaml

from deploy.chart import CHART, ROOT, VERSIONS, Object, parse, problems, service_configuration, template
from dp_extproc.config import parse_config

PAGE = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
VALUES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "deploy/examples").glob("*.yaml"))


def objects_of(path: Path) -> tuple[Object, ...]:
    return parse(path.read_text(encoding="utf-8"))


def templates_of(item: Object) -> list[Object]:
    """Return the templates of the pods of an object."""
    spec = item["spec"]
    if item["kind"] == "LeaderWorkerSet":
        return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]
    return [spec["template"]] if item["kind"] == "Deployment" else []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_match_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    """Every key exists in every supported release, in pods and in custom resources."""
    objects = objects_of(path)
    objects += tuple(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
        for item in objects
        for template in templates_of(item)
    )
    assert [(item["kind"], found) for item in objects if (found := problems(item, version))] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_services_of_examples_select_pods_with_their_ports(path: Path) -> None:
    """The discovery finds an engine only if a Service selects it and names its ports."""
    objects = objects_of(path)
    services = [each for each in objects if each["kind"] == "Service"]
    assert services
    for service in services:
        selector = service["spec"]["selector"]
        # The controller adds the index, by which only the leader is selected.
        labels = {key: value for key, value in selector.items() if not key.startswith("leaderworkerset")}
        (template,) = [
            each
            for item in objects
            for each in templates_of(item)[:1]
            if labels.items() <= each["metadata"]["labels"].items()
        ]
        (engine,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in engine["ports"]}
        assert [(ports[port["targetPort"]], port["name"]) for port in service["spec"]["ports"]] == [
            (port["port"], port["name"]) for port in service["spec"]["ports"]
        ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_engines_of_examples_finish_their_requests(path: Path) -> None:
    """The page promises that running requests of a terminating pod continue, and that no probe runs the model."""
    pods = [each["spec"] for item in objects_of(path) for each in templates_of(item)]
    assert pods
    for pod in pods:
        (engine,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > 60, "the default cuts longer responses"
        assert "--drain" in engine["args"] or engine["lifecycle"]["preStop"]["sleep"]["seconds"] > 1
        probes = {name: engine[name]["httpGet"]["path"] for name in engine if name.endswith("Probe")}
        assert probes.get("readinessProbe", "/ready") == "/ready"
        assert set(probes.values()) <= {"/ready", "/health"}
        assert ("ports" in engine) == ("readinessProbe" in engine), "what serves HTTP has a probe, and nothing else"


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_values_of_the_first_hour_are_rendered(values: str, tmp_path: Path) -> None:
    """Each block of values on the page works on top of the first one, and the service accepts its configuration."""
    path = tmp_path / "values.yaml"
    path.write_text(values, encoding="utf-8")
    done = template("--values", CHART / "ci/sidecar-values.yaml", "--values", path)
    assert done.returncode == 0, done.stderr
    assert parse_config(service_configuration(parse(done.stdout))).pools


@pytest.mark.parametrize("name", ["stand-ins.yaml", "sglang.yaml"])
def test_first_values_name_the_services_of_examples(name: str) -> None:
    """A new user applies an example, and installs the chart with the first values of its page."""
    values = yaml.safe_load((CHART / "ci/sidecar-values.yaml").read_text(encoding="utf-8"))
    (pool,) = values["config"]["pools"]
    services = {
        each["metadata"]["name"] for each in objects_of(ROOT / "deploy/examples" / name) if each["kind"] == "Service"
    }
    assert {pool["prefill"]["service"], pool["decode"]["service"]} == services
