"""Renders the Helm chart, applies its rights, and lets the API server check every object of it."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from interop.kubernetes.cluster import Cluster
from interop.kubernetes.fleet import NAMESPACE

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "dp-extproc"
RIGHTS = {"ServiceAccount", "Role", "RoleBinding"}


def render(programs: Path, values: Path) -> list[dict[str, Any]]:
    """Render the chart with a file of values."""
    command: list[str | Path] = [programs / "helm", "template", "dp-extproc", CHART, "--values", values]
    command += ["--namespace", NAMESPACE, "--kube-version", "1.36.0"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [each for each in yaml.safe_load_all(text) if each]


def grant(cluster: Cluster, programs: Path) -> None:
    """Apply the service account, the role and the binding of the chart."""
    for each in render(programs, CHART / "ci" / "sidecar-values.yaml"):
        if each["kind"] in RIGHTS:
            cluster.apply(each)


def accepted(cluster: Cluster, programs: Path) -> tuple[int, list[str]]:
    """Let the API server check the objects of all topologies without keeping them.

    Returns:
        How many it accepted, and the kinds that it does not have.
    """
    count, unknown, namespaces = 0, set(), {NAMESPACE}
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        for each in render(programs, values):
            if (namespace := each["metadata"]["namespace"]) not in namespaces:
                namespaces.add(namespace)
                cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            if cluster.path_of(each) is None:
                unknown.add(each["kind"])
            else:
                cluster.apply(each, dry_run=True)
                count += 1
    return count, sorted(unknown)
