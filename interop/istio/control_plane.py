"""Runs Istio's ``pilot-discovery`` beside Kubernetes' API server."""

import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.tied_process import end_process, start_tied
from interop.kubernetes.cluster import Cluster
from patience import wait_for

NAMESPACE: Final = "istio-ingress"
DEFINITIONS: Final = ("istio-crds.yaml", "gateway-api-crds.yaml", "inference-crds.yaml")
_ENVIRONMENT: Final = {
    "POD_NAME": "istiod",
    "POD_NAMESPACE": "istio-system",
    "ENABLE_CA_SERVER": "false",
    "PILOT_CERT_PROVIDER": "none",
    # Envoy's own releases lack these filters of Istio's proxy.
    "PILOT_ENABLE_ALPN_FILTER": "false",
    "PILOT_ENABLE_METADATA_EXCHANGE": "false",
    # There is no kubelet that would run what it deploys.
    "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER": "false",
    "ENABLE_GATEWAY_API_INFERENCE_EXTENSION": "true",
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "HOME": "/nonexistent",
}
_MESH: Final = """\
trustDomain: cluster.local
enableAutoMtls: false  # the backend of the neighbour has no sidecar
"""
_STOP_SECONDS: Final = 15.0
_START_SECONDS: Final = 60.0


class ControlPlane:
    """``pilot-discovery`` of a cluster; a context manager."""

    def __init__(self, programs: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        self._programs = programs
        self.xds_port, http_port, monitoring_port, control_port = free_ports(4)
        self._ready = f"http://127.0.0.1:{http_port}/ready"
        self._metrics = f"http://127.0.0.1:{monitoring_port}/metrics"
        self._options = [
            "discovery",
            "--registries=Kubernetes",
            f"--kubeconfig={cluster.directory / 'controllers.yaml'}",
            f"--meshConfig={cluster.directory / 'mesh.yaml'}",
            f"--grpcAddr=127.0.0.1:{self.xds_port}",
            f"--httpAddr=127.0.0.1:{http_port}",
            "--httpsAddr=",
            "--secureGRPCAddr=",
            f"--monitoringAddr=127.0.0.1:{monitoring_port}",
            f"--ctrlz_port={control_port}",
            "--shutdownDuration=1s",
        ]
        self._log_path = cluster.directory / "pilot-discovery.log"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._define()
        (self.cluster.directory / "mesh.yaml").write_text(_MESH, encoding="utf-8")
        log = self._stack.enter_context(self._log_path.open("ab"))
        settings = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        program = str(self._programs / "pilot-discovery")
        process = start_tied(["/usr/bin/env", "-i", *settings, program, *self._options], log, log)
        self._stack.callback(end_process, process, _STOP_SECONDS)
        wait_for(lambda: self._answers(process), _START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def apply(self, *resources: Mapping[str, Any]) -> None:
        """Apply resources as kubectl does. Fields that the API server does not have are errors."""
        for each in resources:
            self.cluster.apply(each)

    def delete(self, resource: Mapping[str, Any]) -> None:
        """Delete a resource."""
        path = self.cluster.path_of(resource)
        assert path is not None
        self.cluster.request("DELETE", path)

    def metrics(self) -> str:
        """Return what it exports for Prometheus."""
        return loopback.CLIENT.get(self._metrics).raise_for_status().text

    def log(self) -> str:
        """Return its log so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def _define(self) -> None:
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for name in DEFINITIONS:
            for each in yaml.load_all((self._programs / name).read_text(encoding="utf-8"), yaml.CSafeLoader):
                if each and each["kind"] == "CustomResourceDefinition":
                    self.cluster.request("POST", definitions, each)
        for name in ("istio-system", NAMESPACE):
            self.cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        self.cluster.request("POST", "/api/v1/nodes", {"metadata": {"name": "node-1"}})

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"pilot-discovery ended:\n{self.log()[-3000:]}")
        try:
            return loopback.CLIENT.get(self._ready).is_success
        except httpx.HTTPError:
            return False
