"""The two kinds of gateways that Istio configures, with another team's host on each, and the Envoy that serves one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from dp_extproc.config import Config, EnvoySettings, SocketAddress
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import ObjectName, Target
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from interop.istio.control_plane import NAMESPACE, ControlPlane
from interop.kubernetes.cluster import ADDRESS

HOST: Final = "llm.example.com"
NEIGHBOUR: Final = "other.example.com"
PORT: Final = 80
"""Port of a gateway's Service. The gateway itself listens on another one."""
_BACKEND: Final = "backend.internal"
_ISTIO: Final = "networking.istio.io/v1"
_GATEWAY_API: Final = "gateway.networking.k8s.io"

Resource = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of gateway. Its Service and its pod have its name."""

    name: str
    title: str
    labels: Mapping[str, str]
    """Labels of the pods."""
    selector: Sequence[tuple[str, str]]
    """Labels by which an ``EnvoyFilter`` finds it; without any, by the name of the Gateway."""
    resources: Sequence[Resource]
    """What a platform team has before: the gateway, and another team's route on it."""

    def target(self, *hostnames: str) -> Target:
        """Return what the command line gives for it."""
        return Target(ObjectName(NAMESPACE, self.name), hostnames, PORT, (), self.selector)


def resource(version: str, kind: str, name: str, spec: Resource) -> Resource:
    """Build a resource in the namespace of the gateways."""
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


CLASSIC: Final = Kind(
    "shared",
    "Gateway of Istio's API",
    {"istio": "ingressgateway"},
    [("istio", "ingressgateway")],
    [
        resource(
            _ISTIO,
            "Gateway",
            "shared",
            {
                "selector": {"istio": "ingressgateway"},
                "servers": [{"port": {"number": PORT, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}],
            },
        ),
        resource(
            _ISTIO,
            "VirtualService",
            "other",
            {
                "hosts": [NEIGHBOUR],
                "gateways": [f"{NAMESPACE}/shared"],
                "http": [{"route": [{"destination": {"host": _BACKEND, "port": {"number": 80}}}]}],
            },
        ),
    ],
)


def _of_gateway_api(name: str, title: str) -> Kind:
    return Kind(
        name,
        title,
        {f"{_GATEWAY_API}/gateway-name": name},
        [],
        [
            resource(
                f"{_GATEWAY_API}/v1",
                "Gateway",
                name,
                {
                    "gatewayClassName": "istio",
                    "addresses": [{"type": "Hostname", "value": f"{name}.{NAMESPACE}.svc.cluster.local"}],
                    "listeners": [{"name": "http", "port": PORT, "protocol": "HTTP"}],
                },
            ),
            http_route(
                f"{name}-other",
                name,
                NEIGHBOUR,
                {"group": "networking.istio.io", "kind": "Hostname", "name": _BACKEND, "port": 80},
            ),
        ],
    )


def http_route(name: str, gateway: str, hostname: str, backend: Resource) -> Resource:
    """Build a route of the Gateway API from a host name to one backend."""
    spec = {"parentRefs": [{"name": gateway}], "hostnames": [hostname], "rules": [{"backendRefs": [backend]}]}
    return resource(f"{_GATEWAY_API}/v1", "HTTPRoute", name, spec)


KUBERNETES: Final = _of_gateway_api("shared-api", "Gateway of Kubernetes' Gateway API")
POOLED: Final = _of_gateway_api("pooled", "InferencePool, endpoint picker")
KINDS: Final = (CLASSIC, KUBERNETES)


def printed(config: Config, target: Target) -> list[Resource]:
    """Return the resources that ``dp-extproc envoy-config --format istio`` prints."""
    (text,) = FORMS["istio"].files(config, target).values()
    return list(yaml.safe_load_all(text))


def backend(port: int) -> Resource:
    """Build the backend of the other team's host."""
    spec = {
        "hosts": [_BACKEND],
        "location": "MESH_INTERNAL",
        "resolution": "STATIC",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": port}],
        "endpoints": [{"address": "127.0.0.1"}],
    }
    return resource(_ISTIO, "ServiceEntry", "backend", spec)


def prepare(plane: ControlPlane, kind: Kind, listener_port: int) -> None:
    """Create the Service and the pod of a gateway, as its Deployment would, and what the platform team has on it."""
    core = f"/api/v1/namespaces/{NAMESPACE}"
    request = plane.cluster.request
    ports = [{"name": "http", "port": PORT, "targetPort": listener_port}]
    spec: dict[str, Any] = {"selector": kind.labels, "ports": ports}
    request("POST", f"{core}/services", {"metadata": {"name": kind.name}, "spec": spec})
    request("POST", f"{core}/serviceaccounts", {"metadata": {"name": kind.name}})
    run_pod(plane, kind.name, kind.labels, ADDRESS, listener_port)
    plane.apply(*kind.resources)


def run_pod(plane: ControlPlane, name: str, labels: Mapping[str, str], address: str, port: int) -> None:
    """Create a pod that is ready, as a kubelet would report it."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    container = {"name": "main", "image": "any", "ports": [{"containerPort": port}]}
    spec = {"nodeName": "node-1", "serviceAccountName": name, "containers": [container]}
    plane.cluster.request("POST", path, {"metadata": {"name": name, "labels": labels}, "spec": spec})
    ready = {"type": "Ready", "status": "True"}
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [ready]}
    plane.cluster.request("PATCH", f"{path}/{name}/status", {"status": status})


def with_free_ports(config: Config) -> Config:
    """Give Envoy's listener and admin port of a configuration other addresses."""
    inference, admin = (SocketAddress(host="127.0.0.1", port=port) for port in free_ports(2))
    return with_settings(config, inference=inference, admin=admin)


def with_settings(config: Config, **settings: Any) -> Config:
    """Change settings of Envoy in a configuration."""
    envoy: EnvoySettings = config.envoy.model_copy(update=settings)
    return config.model_copy(update={"envoy": envoy})


@contextmanager
def run_envoy(
    plane: ControlPlane,
    kind: Kind,
    config: Config,
    *,
    extensions: int = 1,
    drain_seconds: int = 45,
    secrets: Path | None = None,
) -> Iterator[EnvoyProcess]:
    """Run the Envoy of a gateway.

    Args:
        plane: Configures it.
        kind: Its labels and its name.
        config: Has the addresses of its listener and of its admin port.
        extensions: How often its bootstrap has the extension of internal listeners. Istio's proxy has it once.
        drain_seconds: Time for open streams when a listener changes. Istio's proxy has 45.
        secrets: The socket at which the agent of the mesh serves secrets.
    """
    text = _bootstrap(plane.xds_port, kind, config, extensions, secrets)
    options = ("--drain-time-s", str(drain_seconds))
    with EnvoyProcess(config, bootstrap=text, options=options) as envoy:
        yield envoy


def _bootstrap(xds_port: int, kind: Kind, config: Config, extensions: int, secrets: Path | None) -> str:
    """Write what matters here of the bootstrap of Istio's proxy."""
    internal = {
        "name": "envoy.bootstrap.internal_listener",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
            "buffer_size_kb": 64,
        },
    }
    source = {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"}
    pilot = {"socket_address": {"address": "127.0.0.1", "port_value": xds_port}}
    clusters = [_grpc_cluster("xds-grpc", pilot)]
    if secrets is not None:
        clusters.append(_grpc_cluster("sds-grpc", {"pipe": {"path": str(secrets)}}))
    admin = {"address": config.envoy.admin.host, "port_value": config.envoy.admin.port}
    content = {
        "node": {
            "id": f"router~{ADDRESS}~{kind.name}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local",
            "cluster": f"{kind.name}.{NAMESPACE}",
            "metadata": {
                "LABELS": kind.labels,
                "NAMESPACE": NAMESPACE,
                "NAME": kind.name,
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
        "static_resources": {"clusters": clusters},
        "bootstrap_extensions": [internal] * extensions,
        "admin": {"address": {"socket_address": admin}},
    }
    return json.dumps(content)


def _grpc_cluster(name: str, address: Resource) -> Resource:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2 = {"@type": f"type.googleapis.com/{options}", "explicit_http_config": {"http2_protocol_options": {}}}
    endpoint = {"endpoint": {"address": address}}
    return {
        "name": name,
        "type": "STATIC",
        "typed_extension_protocol_options": {options: http2},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
