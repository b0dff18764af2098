"""Render the Helm chart, and validate objects against the schemas of Kubernetes and of custom resources."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy/helm/dp-extproc"
MANIFESTS: Final = ROOT / "deploy/manifests"
TOPOLOGIES: Final = ("sidecar", "service", "picker")
CI: Final = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
NAMESPACE: Final = "llm"
VERSIONS: Final = tuple(f"1.{minor}" for minor in range(31, 37))
"""Releases of Kubernetes that the chart is validated against."""
_CACHE: Final = Path("~/.cache/dp-extproc/kubernetes/bin").expanduser()
"""Where interop/kubernetes/build.sh puts the programs that it builds."""

Object = dict[str, Any]


def tool_path() -> str:
    """Return the directories in which helm is searched: ``KUBE_BIN``, the cache, and the PATH."""
    return os.pathsep.join([os.environ.get("KUBE_BIN", str(_CACHE)), os.environ["PATH"]])


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm. The test is skipped if there is none."""
    program = shutil.which("helm", path=tool_path())
    if program is None:
        pytest.skip("no helm on the PATH or in KUBE_BIN; interop/kubernetes/build.sh helm builds it")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def template(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Render the chart, with options of ``helm template``."""
    return helm("template", "dp-extproc", CHART, "--namespace", NAMESPACE, "--kube-version", VERSIONS[0], *arguments)


@functools.cache
def render(values: Path, *arguments: str) -> tuple[Object, ...]:
    """Return the objects that the chart makes of a file with values."""
    done = template("--values", values, *arguments)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def parse(text: str) -> tuple[Object, ...]:
    """Return the objects of a YAML stream."""
    return tuple(each for each in yaml.safe_load_all(text) if each)


def only(objects: tuple[Object, ...], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def containers(pod: Object) -> list[Object]:
    """Return all containers of a pod's spec, in the order of their start."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def service_configuration(objects: tuple[Object, ...]) -> str:
    """Return the configuration of the service, as it stands in the ConfigMap."""
    configmap = only(objects, "ConfigMap")
    assert configmap["data"].keys() == {"dp-extproc.yaml"}
    text: str = configmap["data"]["dp-extproc.yaml"]
    return text


def problems(item: Object, version: str) -> list[str]:
    """Find where an object differs from its schema in a release of Kubernetes.

    Unknown keys count too. So does null: these schemas allow it for each optional key, but custom resources do not.
    """
    found = [f"{error.json_path}: {error.message}" for error in _validator(item, version).iter_errors(item)]
    return found + [f"{path}: is null" for path in _nulls(item, "$")]


def _nulls(item: Any, path: str) -> Iterator[str]:
    if item is None:
        yield path
    for key, value in item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ():
        yield from _nulls(value, f"{path}.{key}")


def _validator(item: Object, version: str) -> Draft202012Validator:
    custom = Path(__file__).parent / f"schemas/{item['kind']}.json"
    if custom.exists():
        return Draft202012Validator(json.loads(custom.read_text(encoding="utf-8")))
    group = item["apiVersion"].split("/")[0].split(".")[0] + "-" if "/" in item["apiVersion"] else ""
    return _native(f"{item['kind'].lower()}-{group}{item['apiVersion'].split('/')[-1]}.json", version)


@functools.cache
def _native(name: str, version: str) -> Draft202012Validator:
    folder, registry = _definitions(version)
    schema = json.loads((folder / name).read_text(encoding="utf-8"))
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ registry)


@functools.cache
def _definitions(version: str) -> tuple[Path, Registry[Any]]:
    """Find the schemas of one release in the package kubernetes-validate."""
    spec = importlib.util.find_spec("kubernetes_validate")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / f"kubernetes-json-schema/v{version}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text(encoding="utf-8")))
    return folder, definitions @ Registry()
