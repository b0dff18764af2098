"""Envoys as gateways of the Gateway API Inference Extension configure them, with the ports of a test.

Each has the ext_proc filter, the cluster of the picker and the cluster of the engines that its control plane makes, as
far as they matter to a picker: processing modes, timeouts, metadata, TLS, and the way to the picked endpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_extproc.config import Config

Message = dict[str, Any]
_TYPE = "type.googleapis.com/envoy"
_DESTINATION = "x-gateway-destination-endpoint"
DUPLEX = dict.fromkeys(("request_body_mode", "response_body_mode"), "FULL_DUPLEX_STREAMED")
BUFFERED = dict.fromkeys(("request_body_mode", "response_body_mode"), "BUFFERED")
_ALL_HEADERS = dict.fromkeys(
    ("request_header_mode", "response_header_mode", "request_trailer_mode", "response_trailer_mode"), "SEND"
)
_LB = {"untyped": ["envoy.lb"]}


@dataclass(frozen=True, slots=True)
class HostedGateway:
    """One way to configure Envoy."""

    ext_proc: Message
    """Settings of the filter."""
    engines: Callable[[Sequence[int]], Message]
    """Makes the cluster of the engines."""
    per_route: Message | None = None
    """Overrides of the route."""
    tls: bool = True
    """Whether the picker is reached by TLS, without verification."""
    buffer: int = 1 << 20
    """``per_connection_buffer_limit_bytes``; Envoy's own default is 1 MiB."""
    health_check: bool = False
    """Whether Envoy itself checks the health of the picker, by the name of the ext_proc service."""


def original_dst(_ports: Sequence[int]) -> Message:
    return {
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": _DESTINATION},
    }


def override_host(ports: Sequence[int]) -> Message:
    """Istio's cluster: it reads the metadata alone, and reports the endpoint that served."""
    policies = f"{_TYPE}.extensions.load_balancing_policies"
    policy: Message = {
        "@type": f"{policies}.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": {"key": "envoy.lb", "path": [{"key": _DESTINATION}]}}],
        "selected_host_key": {"key": "envoy.lb", "path": [{"key": f"{_DESTINATION}-served"}]},
        "fallback_policy": {
            "policies": [_policy("round_robin", {"@type": f"{policies}.round_robin.v3.RoundRobin"})],
        },
    }
    return {
        "type": "STATIC",
        "lb_policy": "CLUSTER_PROVIDED",
        "load_assignment": _load_assignment("engines", *ports),
        "load_balancing_policy": {"policies": [_policy("override_host", policy)]},
    }


def _ext_proc(mode: Mapping[str, str], **more: Any) -> Message:
    return {"grpc_service": _GRPC, "processing_mode": {**mode, **_ALL_HEADERS}, **more}


_GRPC = {"envoy_grpc": {"cluster_name": "picker", "authority": "picker.llm.svc:9002"}}

GATEWAYS = {
    "istio": HostedGateway(
        ext_proc={
            "grpc_service": {"envoy_grpc": {"cluster_name": "dummy"}, "timeout": "10s"},
            "failure_mode_allow": True,
            "processing_mode": {"request_header_mode": "SKIP", "response_header_mode": "SKIP"},
            "message_timeout": "1000s",
            "metadata_options": {"receiving_namespaces": _LB, "forwarding_namespaces": _LB},
        },
        per_route={
            "overrides": {
                "failure_mode_allow": False,
                "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
                "processing_mode": {**DUPLEX, **_ALL_HEADERS},
            }
        },
        engines=override_host,
    ),
    "envoy-ai-gateway": HostedGateway(_ext_proc(DUPLEX, message_timeout="300s"), original_dst),
    "envoy-ai-gateway-buffered": HostedGateway(
        _ext_proc(BUFFERED, message_timeout="300s"), original_dst, buffer=4 << 20
    ),
    "envoy-ai-gateway-buffered-override": HostedGateway(
        _ext_proc(BUFFERED, message_timeout="300s", allow_mode_override=True), original_dst, buffer=4 << 20
    ),
    "llm-d-standalone": HostedGateway(
        _ext_proc(DUPLEX, message_timeout="1000s", failure_mode_allow=True),
        original_dst,
        tls=False,
        buffer=32768,
        health_check=True,
    ),
}


def build(gateway: HostedGateway, config: Config, engines: Sequence[int]) -> Message:
    """Write a bootstrap that listens as *config* has it, in front of its service and engines at these ports."""
    route: Message = {
        "match": {"prefix": "/"},
        "route": {"cluster": "engines", "timeout": "0s", "idle_timeout": "0s"},
        # Shows a test which engine has answered.
        "response_headers_to_add": [{"header": {"key": "x-upstream", "value": "%UPSTREAM_REMOTE_ADDRESS%"}}],
    }
    if gateway.per_route is not None:
        route["typed_per_filter_config"] = {
            "envoy.filters.http.ext_proc": {
                "@type": f"{_TYPE}.extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
                **gateway.per_route,
            }
        }
    manager: Message = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            _filter("ext_proc", "ext_proc.v3.ExternalProcessor", gateway.ext_proc),
            _filter("router", "router.v3.Router", {}),
        ],
    }
    listener: Message = {
        "name": "gateway",
        "address": _address(config.envoy.inference.port),
        "per_connection_buffer_limit_bytes": gateway.buffer,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": _address(config.envoy.admin.port)},
        "static_resources": {
            "listeners": [listener],
            "clusters": [
                {"name": "engines", "connect_timeout": "10s", **gateway.engines(engines)},
                _picker(gateway, config.listen.grpc.port),
                {"name": "dummy", "type": "STATIC"},
            ],
        },
    }


def _picker(gateway: HostedGateway, port: int) -> Message:
    cluster: Message = {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "typed_extension_protocol_options": {
            f"{_TYPE.rpartition('/')[2]}.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": _load_assignment("picker", port),
    }
    if gateway.tls:  # as Envoy AI Gateway writes it: no CA, no name, no ALPN
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {"validation_context": {}},
            },
        }
    if gateway.health_check:
        check = {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"}
        cluster["health_checks"] = [
            {
                "timeout": "2s",
                "interval": "10s",
                "unhealthy_threshold": 3,
                "healthy_threshold": 2,
                "no_traffic_interval": "1s",
                "grpc_health_check": check,
            }
        ]
    return cluster


def _policy(name: str, settings: Message) -> Message:
    return {"typed_extension_config": {"name": f"envoy.load_balancing_policies.{name}", "typed_config": settings}}


def _filter(name: str, kind: str, settings: Message) -> Message:
    return {
        "name": f"envoy.filters.http.{name}",
        "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.{kind}", **settings},
    }


def _address(port: int) -> Message:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _load_assignment(name: str, *ports: int) -> Message:
    endpoints = [{"endpoint": {"address": _address(port)}} for port in ports]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}
