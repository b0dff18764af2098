"""The Helm chart renders what Kubernetes, the service and Envoy accept, in every topology.

Tests that render the chart need helm, and are skipped without it. The plain manifests in ``deploy/manifests`` were
rendered from the chart, and are checked without helm.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart import (
    CHART,
    CI,
    MANIFESTS,
    NAMESPACE,
    ROOT,
    TOPOLOGIES,
    VERSIONS,
    Object,
    containers,
    helm,
    only,
    parse,
    problems,
    render,
    service_configuration,
    template,
    tool_path,
)
from dp_extproc.config import Config, Protocol, parse_config
from dp_extproc.config.pools import EndpointSources
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.testbed.envoy import find_envoy
from dp_extproc.runtime import reload

VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
TEMPLATES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir()))
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
SIDECAR = CHART / "ci/sidecar-values.yaml"

Case = tuple[Object, Config, tuple[Object, ...]]
"""Values, the configuration of the service, and all objects."""


def values_of(path: Path) -> Object:
    """Return the values of a file, with the defaults of the keys that tests read."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"topology": "sidecar", **given}


@pytest.fixture(params=[*CI, *(MANIFESTS / f"{topology}.yaml" for topology in TOPOLOGIES)], ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Objects that were rendered from one file with values."""
    path: Path = request.param
    if path.parent == MANIFESTS:
        objects = parse(path.read_text(encoding="utf-8"))
        values = values_of(CHART / f"ci/{path.stem}-values.yaml")
    else:
        objects, values = render(path), values_of(path)
    variables = {"POD_IP": "10.0.0.9", "SYNC_URL": "redis://user:secret@redis:6379"}
    return values, parse_config(service_configuration(objects), environment=variables), objects


def pod_of(objects: tuple[Object, ...]) -> Object:
    spec: Object = only(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def service_container(objects: tuple[Object, ...]) -> Object:
    (found,) = [each for each in containers(pod_of(objects)) if each["name"] == "dp-extproc"]
    return found


@pytest.mark.parametrize("values", CI, ids=lambda path: path.name)
def test_chart_passes_strict_lint(values: Path) -> None:
    """Helm finds errors of templates and values that a schema of Kubernetes does not."""
    done = helm("lint", "--strict", "--kube-version", VERSIONS[0], CHART, "--values", values)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_match_the_schemas_of_kubernetes(case: Case, version: str) -> None:
    """Every key exists in every supported release, and in the custom resources."""
    assert [(item["kind"], found) for item in case[2] if (found := problems(item, version))] == []


def test_validation_finds_wrong_keys_and_types() -> None:
    """Otherwise the test above could not fail."""
    deployment = only(parse((MANIFESTS / "sidecar.yaml").read_text(encoding="utf-8")), "Deployment")
    deployment["spec"]["replicas"] = "one"
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    found = "\n".join(problems(deployment, VERSIONS[0]))
    assert "$.spec.replicas" in found
    assert "livenesProbe" in found
    pool = only(parse((MANIFESTS / "picker.yaml").read_text(encoding="utf-8")), "InferencePool")
    pool["spec"]["extensionRef"] = {}
    assert "extensionRef" in str(problems(pool, VERSIONS[0]))


def test_values_files_have_every_topology_with_every_discovery_and_monitoring() -> None:
    """A combination that no file has could be broken without a failing test."""
    found = set()
    for path in CI:
        values = values_of(path)
        text = yaml.safe_dump(values["config"]["pools"])
        discovery = {each for each in ("endpoints", "dns", "file", "service", "selector", "pods") if f"{each}:" in text}
        discovery |= {"pods"} if "matchLabels" in str(values.get("inferencePool")) else set()
        monitoring = {each for each in ("podMonitor", "serviceMonitor") if values.get(each)} or {"none"}
        found |= {(values["topology"], each) for each in discovery | monitoring}
    kinds = ("endpoints", "dns", "file", "service", "selector", "pods", "none", "podMonitor", "serviceMonitor")
    assert found == {(topology, kind) for topology in TOPOLOGIES for kind in kinds}


def test_service_accepts_its_configuration(case: Case) -> None:
    """The loader of the service has read the configuration; it has the addresses of the topology."""
    values, config, objects = case
    topology = values["topology"]
    assert (config.protocol is Protocol.ENDPOINT_PICKER) == (topology == "picker")
    assert str(config.listen.grpc).startswith("127.0.0.1:" if topology == "sidecar" else "0.0.0.0:")
    if topology != "sidecar":
        assert str(config.listen.advertise) == f"10.0.0.9:{config.listen.grpc.port}"
    if topology == "service":
        service = only(tuple(each for each in objects if not each["metadata"]["name"].endswith("-metrics")), "Service")
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        assert config.envoy.service == f"{name}.{namespace}.svc.cluster.local:{config.listen.grpc.port}"
        assert service["spec"]["clusterIP"] == "None"
    (mount,) = [each for each in service_container(objects)["volumeMounts"] if each["name"] == "config"]
    assert "subPath" not in mount, "a subPath never changes, so reload: watch would not work"
    args = service_container(objects)["args"]
    assert args[:3] == ["serve", "-c", f"{mount['mountPath']}/dp-extproc.yaml"]


def test_envoy_accepts_the_printed_configuration(case: Case, tmp_path: Path) -> None:
    """What the service prints for the gateway, or for the Envoy beside it, is valid for Envoy."""
    _, config, objects = case
    runs_envoy = "envoy" in {container["name"] for container in containers(pod_of(objects))}
    assert runs_envoy == (not config.listen.grpc.is_wildcard)
    if config.protocol is Protocol.ENDPOINT_PICKER:
        return  # the gateway configures its Envoy
    envoy = config.envoy.model_copy(update={"service_tls": None})  # its files are on the machine of the gateway
    path = tmp_path / "envoy.yaml"
    path.write_text(render_yaml(build_bootstrap(config.model_copy(update={"envoy": envoy}))), encoding="utf-8")
    command = [find_envoy(), "--mode", "validate", "--config-path", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_selectors_match_pods(case: Case) -> None:
    """A selector with another label selects nothing, without an error."""
    _, _, objects = case
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    services = [each for each in objects if each["kind"] == "Service"]
    selectors = [each["spec"]["selector"] for each in services]
    for item in objects:
        if item["kind"] in {"Deployment", "PodDisruptionBudget", "PodMonitor"}:
            selectors.append(item["spec"]["selector"]["matchLabels"])
        if item["kind"] == "NetworkPolicy":
            selectors.append(item["spec"]["podSelector"]["matchLabels"])
        if item["kind"] == "ServiceMonitor":
            wanted = item["spec"]["selector"]["matchLabels"].items()
            selected = [each for each in services if wanted <= each["metadata"]["labels"].items()]
            (service,) = selected
            assert {each["port"] for each in item["spec"]["endpoints"]} <= {
                each["name"] for each in service["spec"]["ports"]
            }
    selectors += [each["labelSelector"]["matchLabels"] for each in pod_of(objects)["topologySpreadConstraints"]]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert len(selectors) >= 3


def test_ports_are_those_of_the_configuration(case: Case) -> None:
    """Every named port exists, every port has a listener, and Services lead to ports of containers."""
    values, config, objects = case
    ports = [port for each in containers(pod_of(objects)) for port in each.get("ports", [])]
    named = {port["name"]: port["containerPort"] for port in ports if "name" in port}
    expected = {config.listen.admin.port}
    if values["topology"] == "sidecar":
        expected |= {config.envoy.inference.port}
        expected |= set() if config.envoy.admin.host == "127.0.0.1" else {config.envoy.admin.port}
    else:
        expected |= {config.listen.grpc.port + worker for worker in range(config.listen.workers)}
        expected |= {config.listen.health.port} if config.listen.health else set()
    assert {port["containerPort"] for port in ports} == expected
    for item in objects:
        if item["kind"] == "Service":
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= expected
        if item["kind"] == "PodMonitor":
            assert {each["port"] for each in item["spec"]["podMetricsEndpoints"]} <= named.keys()
        if item["kind"] == "InferencePool":
            reference = item["spec"]["endpointPickerRef"]
            assert reference["name"] in {each["metadata"]["name"] for each in objects if each["kind"] == "Service"}
            assert reference["port"]["number"] == config.listen.grpc.port
        if item["kind"] == "NetworkPolicy":
            allowed = {port["port"] for rule in item["spec"]["ingress"] for port in rule.get("ports", [])}
            assert allowed <= expected
    for container in containers(pod_of(objects)):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            check = container.get(probe, {})
            used = [check[kind]["port"] for kind in ("httpGet", "grpc", "tcpSocket") if kind in check]
            assert all((port in named) if isinstance(port, str) else (port in expected) for port in used)


def test_probes_reach_the_service(case: Case) -> None:
    """The kubelet has no TLS for gRPC, reaches no loopback address, and one gRPC port is one worker process."""
    _, config, objects = case
    container = service_container(objects)
    probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    listen = config.listen
    by_grpc = (listen.tls is None or listen.health is not None) and listen.grpc.is_wildcard and listen.workers == 1
    assert ["grpc" in probe for probe in probes] == [by_grpc] * 3
    if by_grpc:
        assert [probe["grpc"]["service"] for probe in probes] == ["liveness", "liveness", "readiness"]
        assert {probe["grpc"]["port"] for probe in probes} == {(listen.health or listen.grpc).port}
    else:
        assert [probe["httpGet"]["path"] for probe in probes] == ["/healthz", "/healthz", "/readyz"]


def test_mounts_have_their_sources(case: Case) -> None:
    """A pod waits for ever for a volume, ConfigMap or Secret that does not exist."""
    values, _, objects = case
    pod = pod_of(objects)
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert len(volumes) == len(pod["volumes"])
    mounted = set()
    for container in containers(pod):
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        mounted |= {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == volumes.keys()
    rendered = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"} | {"kube-root-ca.crt"}
    maps: set[str] = set()
    secrets: set[str] = set()
    for name, key, found in _references([pod]):
        (maps if key in {"configMap", "configMapKeyRef"} else secrets).add(found[name])
    assert maps <= rendered | {each for each in maps if f"name: {each}" in yaml.safe_dump(values.get("extraVolumes"))}
    assert all(re.search(rf": {name}$", yaml.safe_dump(values), re.MULTILINE) for name in secrets)


def _references(item: Any) -> Iterator[tuple[str, str, Object]]:
    """Find the references to ConfigMaps and Secrets: the key of the name, the kind, and the reference."""
    for key, value in item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ():
        if key in {"configMap", "configMapKeyRef", "secretKeyRef"}:
            yield "name", key, value
        elif key == "secret":
            yield "secretName", key, value
        yield from _references(value)


def test_access_is_what_the_discovery_reads(case: Case) -> None:
    """A missing right stops the discovery, and a right too many is a risk."""
    values, config, objects = case
    expected: dict[str, set[str]] = {}
    for source in [each for pool in config.pools for _, sources in pool.sources() for each in sources.kubernetes]:
        resources = {"endpointslices.discovery.k8s.io"} if source.pods is None else {"pods"}
        if source.inference_pool is not None:
            resources = {"inferencepools.inference.networking.k8s.io", "pods"}
        expected.setdefault(source.namespace or NAMESPACE, set()).update(resources)
    roles = {each["metadata"]["namespace"]: each for each in objects if each["kind"] == "Role"}
    if values.get("rbac") == {"create": False}:
        expected = {}
    found: dict[str, set[str]] = {}
    for namespace, role in roles.items():
        for rule in role["rules"]:
            assert rule["verbs"] == ["list", "watch"]
            groups = rule["apiGroups"]
            names = [f"{each}.{group}".rstrip(".") for each in rule["resources"] for group in groups]
            found.setdefault(namespace, set()).update(names)
    assert found == expected
    account = pod_of(objects)["serviceAccountName"]
    for binding in [each for each in objects if each["kind"] == "RoleBinding"]:
        role = roles[binding["metadata"]["namespace"]]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]
    accounts = [each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"]
    assert accounts == ([] if account == "default" else [account])
    assert not [each for each in objects if each["kind"].startswith("Cluster")]


def test_token_is_mounted_where_it_is_needed(case: Case) -> None:
    """Only the service reads the API server, and only by the discovery of Kubernetes. Envoy faces clients."""
    _, config, objects = case
    pod = pod_of(objects)
    assert pod["automountServiceAccountToken"] is False
    sources: list[EndpointSources] = [each for pool in config.pools for _, each in pool.sources()]
    discovers = any(each.kubernetes for each in sources)
    with_token = [
        container["name"]
        for container in containers(pod)
        if TOKEN in {mount["mountPath"] for mount in container["volumeMounts"]}
    ]
    assert with_token == (["dp-extproc"] if discovers else [])


def test_containers_have_least_privileges(case: Case) -> None:
    """Each container does what a restricted namespace allows, and writes into its own volumes alone."""
    values, _, objects = case
    pod = pod_of(objects)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"].get("runAsUser") == (None if "podSecurityContext" in values else 65532)
    for container in containers(pod):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"].keys() == {"memory"}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_pods_have_time_to_stop(case: Case) -> None:
    """A pod that is killed cuts the responses in flight."""
    values, config, objects = case
    pod = pod_of(objects)
    needed = config.drain
    if values["topology"] == "sidecar":
        (envoy,) = [each for each in pod["containers"] if each["name"] == "envoy"]
        command = envoy["lifecycle"]["preStop"]["exec"]["command"]
        assert command[-3:-1] == [
            str(config.envoy.admin.port),
            str(values.get("envoy", {}).get("drainSeconds", {}).get("least", 10)),
        ]
        needed += int(command[-1])
        (service,) = [each for each in pod["initContainers"] if each["name"] == "dp-extproc"]
        assert service["restartPolicy"] == "Always", "such a container starts before Envoy, and is stopped after it"
    assert pod["terminationGracePeriodSeconds"] >= needed + 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set-json", "config.pools=[]"), "config.pools is empty"),
        (("--set", "replicas=2"), "several replicas need a bus"),
        (("--set", "autoscaling.enabled=true"), "several replicas need a bus"),
        (("--set", "replicas=2,sync.url=unix:///tmp/bus"), "unix:// is for processes of one pod"),
        (("--set", "tls.secret=a"), "tls.secret is for the topologies service and picker"),
        (("--set-json", 'topology="picker"', "--set-json", 'config.pools=[{"models": ["*"]}]'), "matchLabels is empty"),
        (("--set", "topology=picker,inferencePool.failureMode=FailOpen"), "would end a prefill engine"),
        (("--set", "config.listen.workers=${PROCESSES}"), "config.listen.workers is ${PROCESSES}"),
        (("--set", "config.listen.admin=0.0.0.0:${PORT}"), "config.listen.admin is"),
        (("--set", "config.drain=${DRAIN:-5s}"), "config.drain is"),
        (
            (
                *("--set-json", 'config.pools=[{"models": ["*"], "workers": {"service": "a"}}]'),
                *("--set", "topology=picker,inferencePool.create=false,config.listen.workers=2"),
            ),
            "leave config.listen.workers out",
        ),
        (("--set", "networkPolicy.enabled=true,podMonitor.enabled=true"), "networkPolicy.monitoring is empty"),
        (("--set", "topology=mesh"), "topology"),
        (("--set", "replica=2"), "replica"),
        (("--set", "envoy.image.digest=latest"), "digest"),
        (("--set", "config.listen.adnin=0.0.0.0:9090"), "'adnin'"),
        (("--set", "config.drain=10"), "/config/drain"),
        (("--set-json", 'config.pools=[{"models": ["*"], "prefill": {"service": "a", "prot": 1}}]'), "'prot'"),
    ],
)
def test_chart_refuses_values_that_do_not_work(arguments: tuple[str, ...], message: str) -> None:
    """A mistake is found before anything runs, with its remedy."""
    done = template("--values", SIDECAR, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_pods_restart_only_for_settings_that_need_it() -> None:
    """A change of pools is in use without a restart. Kubernetes restarts pods if anything in their template changes."""

    def pods(*changes: str) -> Object:
        options = [each for change in changes for each in ("--set-json", change)]
        found: Object = only(render(SIDECAR, *options), "Deployment")["spec"]["template"]
        return found

    as_it_is = pods()
    changed = ('config.load={"interval": "2s"}', "config.admission={}", 'config.autoscaling={"decode_target": 0.5}')
    assert pods(*changed) == as_it_is
    assert pods('config.pools=[{"models": ["*"], "workers": {"pods": "app=a", "namespace": "other"}}]') == as_it_is
    assert pods('config.load={"prefill_step_cost_tokens": 400}') != as_it_is
    assert pods("config.queue={}") != as_it_is
    assert pods('config.drain="2s"') != as_it_is, "the time to stop follows it"
    (omitted,) = re.findall(r"omit \$config ([^\n]*?) -}}", TEMPLATES)
    assert set(re.findall(r'"([a-z_]+)"', omitted)) == reload._CHANGEABLE
    (kept,) = re.findall(r"pick \(default dict \$config.load\) ([^\n]*?)\) -}}", TEMPLATES)
    assert set(re.findall(r'"([a-z_]+)"', kept)) == set(reload._FIXED_LOADS)


def leaves(schema: Object, *path: str) -> Iterator[tuple[str, Object]]:
    """List the values that a schema describes: each property that has no properties of its own."""
    for name, each in schema["properties"].items():
        if path == ("config",) and name not in VALUES["config"]:
            continue  # the configuration has a page of its own
        if "properties" in each:
            yield from leaves(each, *path, name)
        else:
            yield ".".join((*path, name)), each


def value_at(path: str) -> Any:
    found = VALUES
    for key in path.split("."):
        found = found[key]
    return found


def values_in(item: Any, *path: str) -> Iterator[str]:
    """List the paths of all values in values.yaml."""
    if isinstance(item, dict) and item:
        for key, each in item.items():
            yield from values_in(each, *path, key)
    else:
        yield ".".join(path)


DESCRIBED = {path: schema for path, schema in leaves(SCHEMA) if path != "global"}


@pytest.mark.parametrize("path", DESCRIBED)
def test_value_is_documented_and_used(path: str) -> None:
    """Every value has a default, a description in the schema, the same one in the README, and a place in a template."""
    default = json.dumps(value_at(path), ensure_ascii=False)
    row = f"| `{path}` | `{default}` | {DESCRIBED[path]['description']} |"
    assert row in (CHART / "README.md").read_text(encoding="utf-8").splitlines()
    assert is_used(path) or path.startswith("config.")


def is_used(path: str) -> bool:
    """Return whether a template reads a value, or passes its parent on to a named template that reads it."""
    if re.search(rf"\.Values\.{re.escape(path)}(?![.\w])", TEMPLATES):
        return True
    parent, _, name = path.rpartition(".")
    users = re.findall(rf'include "(dp-extproc\.\w+)" (?:\(list )?\.Values\.{re.escape(parent)}(?![.\w])', TEMPLATES)
    bodies = [TEMPLATES.split(f'define "{user}"', 1)[1].split("{{- define ", 1)[0] for user in users]
    return bool(bodies) and all(re.search(rf"\.{name}\b", body) for body in bodies)


def test_values_are_in_the_schema() -> None:
    """The schema describes every value, and no other."""
    for path in values_in(VALUES):
        assert any(path == each or path.startswith(f"{each}.") for each in DESCRIBED), path
    table = (CHART / "README.md").read_text(encoding="utf-8").split("## Values")[1]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert rows == list(DESCRIBED)


def test_troubleshooting_has_messages_as_they_are() -> None:
    """An operator searches the page for the message of a log."""
    text = (ROOT / "deploy/README.md").read_text(encoding="utf-8").split("## Troubleshooting")[1]
    quoted = {each for row in re.findall(r"^\| ([^|]*)", text, re.MULTILINE) for each in re.findall(r"`([^`]+)`", row)}
    of_kubernetes = {
        "ErrImagePull", "dp-extproc:0.1.0", "Init:CrashLoopBackOff", "CrashLoopBackOff", "spec.selector",
        'no matches for kind "PodMonitor"',
    }  # fmt: skip
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")) + TEMPLATES
    assert len(quoted - of_kubernetes) > 5
    # The library adds the end of a counter's name.
    assert {each for each in quoted - of_kubernetes if each.removesuffix("_total") not in ours} == set()


def test_schema_of_values_has_that_of_the_configuration(tmp_path: Path) -> None:
    """``make manifests`` was run after the last change of the configuration, so that Helm accepts its keys."""
    path = tmp_path / "values.schema.json"
    shutil.copy(CHART / "values.schema.json", path)
    subprocess.run([sys.executable, ROOT / "deploy/helm/config_schema.py", path], check=True)
    assert json.loads(path.read_text(encoding="utf-8")) == SCHEMA


def test_chart_has_the_versions_of_the_project() -> None:
    """Chart, image and Envoy are those that the tests run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (chart["version"], chart["appVersion"]) == (project["version"],) * 2
    assert chart["description"] == project["description"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    image = VALUES["envoy"]["image"]
    assert f"{image['repository']}:{image['tag']}" == compose["services"]["envoy"]["image"]


def test_manifests_are_those_of_the_chart(tmp_path: Path) -> None:
    """``make manifests`` was run after the last change of the chart."""
    if shutil.which("helm", path=tool_path()) is None:
        pytest.skip("no helm on the PATH or in KUBE_BIN; interop/kubernetes/build.sh helm builds it")
    subprocess.run([MANIFESTS / "render.sh", tmp_path], check=True)
    for topology in TOPOLOGIES:
        name = f"{topology}.yaml"
        assert (tmp_path / name).read_text(encoding="utf-8") == (MANIFESTS / name).read_text(encoding="utf-8")
