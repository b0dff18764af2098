"""Lets Kubernetes' own API server check the printed resources against the definitions of Envoy Gateway."""

from functools import partial
from pathlib import Path
from typing import Final

import yaml

from dp_extproc.config import parse_config
from dp_extproc.lab.testbed.service import write_config
from interop.envoy_gateway.cases import printed
from interop.envoy_gateway.picker import EXAMPLE
from interop.kubernetes.cluster import Cluster
from interop.report import Report
from patience import wait_for

DEFINITIONS: Final = "envoy-gateway-crds.yaml"
PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", DEFINITIONS)
_CRDS: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_POOL: Final = {"models": ["*"], "workers": {"endpoints": ["http://127.0.0.1:1"]}}
_PATIENCE: Final = 60.0


def checked_by_api_server(programs: Path, folder: Path, report: Report) -> None:
    """Apply resources without keeping them: unknown fields, and rules of the definitions, are errors."""
    if missing := [name for name in PROGRAMS if not (programs / name).is_file()]:
        print(f"skipped: the check by an API server, without {', '.join(missing)}", flush=True)
        return
    texts = {
        **printed(parse_config(yaml.safe_dump(write_config([_POOL])))),
        EXAMPLE.name: EXAMPLE.read_text(encoding="utf-8"),
    }
    with Cluster(programs, folder) as cluster:
        definitions = yaml.load_all((programs / DEFINITIONS).read_text(encoding="utf-8"), yaml.CSafeLoader)
        for each in definitions:
            if each and each["kind"] == "CustomResourceDefinition":
                cluster.request("POST", _CRDS, each)
        accepted, refused = [], []
        for name, text in texts.items():
            for resource in yaml.safe_load_all(text):
                wait_for(partial(cluster.path_of, resource), _PATIENCE)
                try:
                    cluster.apply(resource, dry_run=True)
                    accepted.append(resource["kind"])
                except RuntimeError as error:
                    refused.append(f"{name}: {error}")
    seen = f"accepted (server-side dry run, strict fields): {', '.join(accepted)}"
    report.add("API server with the definitions", "; ".join([seen, *refused]), good=not refused)
