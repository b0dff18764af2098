"""Runs Istio's ``pilot-discovery`` beside Kubernetes' API server, and makes the bootstrap of a gateway for it."""

import json
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from dp_extproc.config import Config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.tied_process import end_process, start_tied
from interop.kubernetes.cluster import ADDRESS, Cluster
from patience import wait_for

NAMESPACE: Final = "istio-ingress"
GATEWAY: Final = "shared"
LABELS: Final = {"istio": "ingressgateway"}
HOST: Final = "llm.example.com"
NEIGHBOUR: Final = "other.example.com"
PORT: Final = 80
"""Port of the gateway's Service. The gateway itself listens on another one."""
DEFINITIONS: Final = ("istio-crds.yaml", "gateway-api-crds.yaml")
_POD: Final = "gateway-1"
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
    "INJECTION_WEBHOOK_CONFIG_NAME": "",
    "VALIDATION_WEBHOOK_CONFIG_NAME": "",
    "HOME": "/nonexistent",
}
_STOP_SECONDS: Final = 15.0
_START_SECONDS: Final = 60.0


class ControlPlane:
    """``pilot-discovery`` with a cluster that has the pod and the Service of a gateway; a context manager."""

    def __init__(self, programs: Path, cluster: Cluster, listener_port: int) -> None:
        self._cluster = cluster
        self._programs = programs
        self._listener_port = listener_port
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
        self._run_gateway_pod()
        (self._cluster.directory / "mesh.yaml").write_text(
            "trustDomain: cluster.local\nenableAutoMtls: false\n", encoding="utf-8"
        )
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

    def apply(self, *resources: Mapping[str, Any] | str) -> None:
        """Apply resources as kubectl does. A text is YAML of one of them. Unknown fields are errors."""
        for each in resources:
            self._cluster.apply(yaml.safe_load(each) if isinstance(each, str) else each)

    def delete(self, resource: str) -> None:
        """Delete the resource that a YAML text describes."""
        path = self._cluster.path_of(yaml.safe_load(resource))
        assert path is not None
        self._cluster.request("DELETE", path)

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
                    self._cluster.request("POST", definitions, each)
        for name in ("istio-system", NAMESPACE):
            self._cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})

    def _run_gateway_pod(self) -> None:
        core = f"/api/v1/namespaces/{NAMESPACE}"
        ports = [{"name": "http", "port": PORT, "targetPort": self._listener_port}]
        spec: dict[str, Any] = {"selector": LABELS, "ports": ports}
        self._cluster.request("POST", f"{core}/services", {"metadata": {"name": GATEWAY}, "spec": spec})
        self._cluster.request("POST", f"{core}/serviceaccounts", {"metadata": {"name": GATEWAY}})
        self._cluster.request("POST", "/api/v1/nodes", {"metadata": {"name": "node-1"}})
        container = {"name": "istio-proxy", "image": "proxy", "ports": [{"containerPort": self._listener_port}]}
        spec = {"nodeName": "node-1", "serviceAccountName": GATEWAY, "containers": [container]}
        metadata = {"name": _POD, "labels": LABELS}
        self._cluster.request("POST", f"{core}/pods", {"metadata": metadata, "spec": spec})
        ready = {"type": "Ready", "status": "True"}
        status = {"phase": "Running", "podIP": ADDRESS, "podIPs": [{"ip": ADDRESS}], "conditions": [ready]}
        self._cluster.request("PATCH", f"{core}/pods/{_POD}/status", {"status": status})

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"pilot-discovery ended:\n{self.log()[-3000:]}")
        try:
            return loopback.CLIENT.get(self._ready).is_success
        except httpx.HTTPError:
            return False


def bootstrap(config: Config, control_plane: ControlPlane, *, extensions: int = 1) -> str:
    """Write the bootstrap of the gateway's Envoy, with what matters here of the one of Istio's proxy.

    Args:
        config: Has the address of Envoy's admin port.
        control_plane: Where Envoy gets everything else from.
        extensions: How often the bootstrap extension of internal listeners is there. Istio's proxy has it once.
    """
    internal = {
        "name": "envoy.bootstrap.internal_listener",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
            "buffer_size_kb": 64,
        },
    }
    source = {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"}
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = {"@type": f"type.googleapis.com/{options}", "explicit_http_config": {"http2_protocol_options": {}}}
    pilot = {"socket_address": {"address": "127.0.0.1", "port_value": control_plane.xds_port}}
    admin = {"address": config.envoy.admin.host, "port_value": config.envoy.admin.port}
    content = {
        "node": {
            "id": f"router~{ADDRESS}~{_POD}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local",
            "cluster": f"{GATEWAY}.{NAMESPACE}",
            "metadata": {
                "LABELS": LABELS,
                "NAMESPACE": NAMESPACE,
                "NAME": _POD,
                "ISTIO_VERSION": "1.31.0",
                "CLUSTER_ID": "Kubernetes",
                "INSTANCE_IPS": ADDRESS,
            },
        },
        "dynamic_resources": {
            "lds_config": source,
            "cds_config": source,
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "xds-grpc",
                    "type": "STATIC",
                    "typed_extension_protocol_options": {options: http2},
                    "load_assignment": {
                        "cluster_name": "xds-grpc",
                        "endpoints": [{"lb_endpoints": [{"endpoint": {"address": pilot}}]}],
                    },
                }
            ]
        },
        "bootstrap_extensions": [internal] * extensions,
        "admin": {"address": {"socket_address": admin}},
    }
    return json.dumps(content)


def shared_gateway(backend_port: int) -> list[dict[str, Any]]:
    """Build what is there before: a ``Gateway``, and another team's host on it with its backend."""
    version = "networking.istio.io/v1"
    return [
        {
            "apiVersion": version,
            "kind": "Gateway",
            "metadata": {"name": GATEWAY, "namespace": NAMESPACE},
            "spec": {
                "selector": LABELS,
                "servers": [{"port": {"number": PORT, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}],
            },
        },
        {
            "apiVersion": version,
            "kind": "ServiceEntry",
            "metadata": {"name": "backend", "namespace": NAMESPACE},
            "spec": {
                "hosts": ["backend.internal"],
                "location": "MESH_INTERNAL",
                "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": backend_port}],
                "endpoints": [{"address": "127.0.0.1"}],
            },
        },
        {
            "apiVersion": version,
            "kind": "VirtualService",
            "metadata": {"name": "other", "namespace": NAMESPACE},
            "spec": {
                "hosts": [NEIGHBOUR],
                "gateways": [f"{NAMESPACE}/{GATEWAY}"],
                "http": [{"route": [{"destination": {"host": "backend.internal", "port": {"number": 80}}}]}],
            },
        },
    ]
