"""Envoy's clusters lead to the service, to engines at addresses in headers, and to Envoy's own internal listeners."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.transport_sockets.internal_upstream.v3 import InternalUpstreamTransport
from envoy_data_plane.envoy.extensions.transport_sockets.raw_buffer.v3 import RawBuffer
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstream
from envoy_data_plane.envoy.type.v3 import Percent

from dp_extproc.config import Config, Supervise, TruncatedStreams
from dp_extproc.contract import DECODE_HOST, OWNER, PREFILL_HOST
from dp_extproc.envoy_config.addresses import has_dns_name, host_and_port, is_ip, may_be_several, services_of
from dp_extproc.envoy_config.filters import (
    last_upstream_filter,
    report_first_event,
    strip_attempt_headers,
    strip_steering_headers,
)
from dp_extproc.envoy_config.listeners import buffer_bytes
from dp_extproc.envoy_config.lua_filters import complete_responses
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.telemetry import collectors
from dp_extproc.envoy_config.tls import to_engines_tls, to_service_tls, transport_socket
from dp_extproc.envoy_config.yaml_text import commented, pack

_UNLIMITED: Final = 1_000_000
"""Threshold of a circuit breaker that never trips. Streams that last minutes soon reach Envoy's default of 1024."""

_CONNECT_TIMEOUT: Final = timedelta(seconds=2)
"""Time to connect. Linux repeats a lost SYN after 1 s, so one loss is survived and a dead host is noticed soon."""

_ENGINE_IDLE_TIMEOUT: Final = timedelta(seconds=4)
"""Idle time of a connection to an engine. It is below uvicorn's 5 s (``timeout_keep_alive``), so Envoy closes first."""

_READINESS_CHECK: Final = core.HealthCheck(
    timeout=timedelta(seconds=1),
    interval=timedelta(seconds=1),
    no_traffic_interval=timedelta(seconds=1),  # Envoy's default checks a service without traffic once a minute.
    unhealthy_threshold=2,
    healthy_threshold=1,
    grpc_health_check=core.HealthCheckGrpcHealthCheck(),
)
"""Health check of several services. Envoy leaves one that hangs after 2 s, and one that stops within 1 s."""

_EJECTION: Final = cluster.OutlierDetection(
    split_external_local_origin_errors=True,
    consecutive_local_origin_failure=1,
    max_ejection_percent=100,
    base_ejection_time=timedelta(seconds=3),  # The health check takes over by then; its success ends the ejection.
    interval=timedelta(milliseconds=500),
)
"""Ejection of a dead process at the first connection that it refuses, before the next health check."""

_LARGEST_WINDOW: Final = (1 << 31) - 1
"""Largest window of an HTTP/2 stream (RFC 9113, 6.9.1), in bytes. Envoy limits its own send buffer by the window.

If that buffer is full (16 MiB by default), an upstream ext_proc filter crashes Envoy when the request ends. The end of
its stream resumes reading from an engine that was released just before (measured with 1.38 to 1.40). With the largest
window, the filter stops at the buffer of its own cluster, and no crash follows.
"""

_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def build_clusters(config: Config) -> list[cluster.Cluster]:
    """Build all clusters. None of them names an engine."""
    names, buffer = Names.of(config), buffer_bytes(config.envoy)
    supervised = config.supervision.mode is Supervise.FIRST_EVENT
    first_event = [report_first_event(names, config.envoy.body_mode)] if supervised else []
    owner = _grpc_options(config.listen.keepalive, stream_window=_LARGEST_WINDOW)
    dispatch = _http_options(
        [
            strip_attempt_headers(config.envoy.session_header),
            complete_responses(retries=config.retry.attempts > 1),
            last_upstream_filter(),
        ]
    )
    clusters = [commented(_to_service(config, buffer), "The service: envoy.service, or listen.grpc.")]
    if supervised or not config.sends_legs:
        clusters.append(
            commented(
                _to_address_in_header(names.service_owner, OWNER, owner, buffer, to_service_tls(config)),
                "The process of the service that scheduled the request and has its reservations.",
            )
        )
    to_dispatch = commented(_to_listener(names.dispatch, buffer, dispatch), "The way to the internal listeners.")
    to_decode = _to_decode(config, _engine_options(first_event), buffer)
    to_collectors = build_collectors(config)
    if config.sends_legs:
        return [*clusters, *to_decode, to_dispatch, *to_collectors]
    to_prefill = commented(
        _to_address_in_header(names.prefill, PREFILL_HOST, _engine_options(), buffer, to_engines_tls(config)),
        "Envoy dials the address in a header. There is no fallback, because the body names the prefill\n"
        "endpoint to which the decode engine will connect.",
    )
    to_leg = _to_listener(names.prefill_leg, buffer)
    return [*clusters, to_prefill, *to_decode, to_dispatch, to_leg, *to_collectors]


def build_collectors(config: Config) -> list[cluster.Cluster]:
    """Build the clusters that the spans and access logs of every listener need, that of clients among them."""
    return [_to_collector(name, *host_and_port(address)) for name, address in collectors(config)]


def _to_service(config: Config, buffer: int) -> cluster.Cluster:
    """Build the cluster of the service: its worker processes in turn, and a standby once none of them is healthy."""
    name, discovery = Names.of(config).service, cluster.ClusterDiscoveryType
    localities = [
        endpoint.LocalityLbEndpoints(
            priority=priority,
            lb_endpoints=[_endpoint(_socket_address(host, port + worker)) for worker in range(config.listen.workers)],
        )
        for priority, (host, port) in enumerate(services_of(config))
    ]
    service = cluster.Cluster(
        name=name,
        type=discovery.STRICT_DNS if has_dns_name(config) else discovery.STATIC,
        connect_timeout=_CONNECT_TIMEOUT,
        per_connection_buffer_limit_bytes=buffer,
        load_assignment=endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=localities),
        circuit_breakers=_unlimited(),
        typed_extension_protocol_options={_HTTP_OPTIONS: pack(_grpc_options(config.listen.keepalive))},
        transport_socket=to_service_tls(config),
    )
    if may_be_several(config):
        service.health_checks = [_READINESS_CHECK]
        service.outlier_detection = _EJECTION
        # If all are unhealthy, one of them still gets the request and refuses it with a reason. Envoy's default does
        # so as soon as half of them are.
        service.common_lb_config = cluster.ClusterCommonLbConfig(
            healthy_panic_threshold=Percent(value=1.0),
            update_merge_window=timedelta(0),  # Envoy's default delays changes of health by a second.
        )
    return service


def _to_collector(name: str, host: str, port: int) -> cluster.Cluster:
    """Build the cluster of a program that gets spans or access logs by gRPC."""
    locality = endpoint.LocalityLbEndpoints(lb_endpoints=[_endpoint(_socket_address(host, port))])
    http2 = upstream.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=core.Http2ProtocolOptions())
    return cluster.Cluster(
        name=name,
        type=cluster.ClusterDiscoveryType.STATIC if is_ip(host) else cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=_CONNECT_TIMEOUT,
        load_assignment=endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=[locality]),
        circuit_breakers=_unlimited(),
        typed_extension_protocol_options={
            _HTTP_OPTIONS: pack(upstream.HttpProtocolOptions(explicit_http_config=http2))
        },
    )


def _socket_address(host: str, port: int) -> core.Address:
    return core.Address(socket_address=core.SocketAddress(address=host, port_value=port))


def _to_address_in_header(
    name: str,
    header: str,
    options: upstream.HttpProtocolOptions,
    buffer: int,
    transport: core.TransportSocket | None = None,
) -> cluster.Cluster:
    by_header = _to_address_in_filter_state(name, buffer)
    by_header.typed_extension_protocol_options = {_HTTP_OPTIONS: pack(options)}
    by_header.original_dst_lb_config = cluster.ClusterOriginalDstLbConfig(use_http_header=True, http_header_name=header)
    by_header.transport_socket = transport
    return by_header


def _to_address_in_filter_state(name: str, buffer: int) -> cluster.Cluster:
    """Build a cluster without endpoints: each connection goes to the address that its filter state has."""
    return cluster.Cluster(
        name=name,
        type=cluster.ClusterDiscoveryType.ORIGINAL_DST,
        connect_timeout=_CONNECT_TIMEOUT,
        per_connection_buffer_limit_bytes=buffer,
        lb_policy=cluster.ClusterLbPolicy.CLUSTER_PROVIDED,
        circuit_breakers=_unlimited(),
    )


def _to_decode(config: Config, options: upstream.HttpProtocolOptions, buffer: int) -> list[cluster.Cluster]:
    """Build the way to decode endpoints: direct, or through the listener that ends truncated streams.

    Only the last cluster of the way has TLS, because that listener changes plain HTTP.
    """
    names, transport = Names.of(config), to_engines_tls(config)
    if config.envoy.truncated_streams is TruncatedStreams.RESET:
        return [_to_address_in_header(names.decode, DECODE_HOST, options, buffer, transport)]
    last = _to_address_in_filter_state(names.decode_server, buffer)
    last.transport_socket = transport
    return [_to_listener(names.decode, buffer, options), last]


def _to_listener(listener: str, buffer: int, options: upstream.HttpProtocolOptions | None = None) -> cluster.Cluster:
    address = core.Address(envoy_internal_address=core.EnvoyInternalAddress(server_listener_name=listener))
    locality = endpoint.LocalityLbEndpoints(lb_endpoints=[_endpoint(address)])
    raw = transport_socket("raw_buffer", RawBuffer())
    return cluster.Cluster(
        name=listener,
        type=cluster.ClusterDiscoveryType.STATIC,
        per_connection_buffer_limit_bytes=buffer,
        load_assignment=endpoint.ClusterLoadAssignment(cluster_name=listener, endpoints=[locality]),
        circuit_breakers=_unlimited(),
        typed_extension_protocol_options={_HTTP_OPTIONS: pack(options)} if options else {},
        transport_socket=transport_socket("internal_upstream", InternalUpstreamTransport(transport_socket=raw)),
    )


def _endpoint(address: core.Address) -> endpoint.LbEndpoint:
    return endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=address))


def _grpc_options(keepalive_seconds: float, *, stream_window: int | None = None) -> upstream.HttpProtocolOptions:
    keepalive = timedelta(seconds=keepalive_seconds)
    http2 = commented(
        core.Http2ProtocolOptions(
            initial_stream_window_size=stream_window,
            connection_keepalive=core.KeepaliveSettings(interval=keepalive, timeout=keepalive),
        ),
        connection_keepalive="listen.keepalive: a service whose machine is lost closes no connection. When\n"
        "pings fail, requests that wait for it continue; see failure_mode_allow above. The service pings Envoy, too.",
        initial_stream_window_size="The largest value, because it also limits Envoy's send buffer for a stream.\n"
        "With the default of 16 MiB, Envoy crashes if a request ends while that buffer is full of unread\n"
        "response data.",
    )
    protocol = upstream.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2)
    return upstream.HttpProtocolOptions(explicit_http_config=protocol)


def _http_options(filters: Sequence[HttpFilter]) -> upstream.HttpProtocolOptions:
    protocol = upstream.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions())
    return upstream.HttpProtocolOptions(explicit_http_config=protocol, http_filters=list(filters))


def _engine_options(filters: Sequence[HttpFilter] = ()) -> upstream.HttpProtocolOptions:
    options = _http_options([strip_steering_headers(), *filters, last_upstream_filter()])
    options.common_http_protocol_options = commented(
        core.HttpProtocolOptions(idle_timeout=_ENGINE_IDLE_TIMEOUT),
        idle_timeout="Shorter than the 5 s after which SGLang's HTTP server closes an idle connection. Otherwise\n"
        "Envoy would sometimes send a request into a closing one.",
    )
    return commented(
        options,
        http_filters="Remove steering headers after Envoy picked the endpoint by one of them; a route would do so\n"
        "before. Only the front door retries, since a second try from here would have no headers left. Responses lose\n"
        "the same headers before Envoy's router reads them, so that an engine steers nothing.",
    )


def _unlimited() -> cluster.CircuitBreakers:
    thresholds = cluster.CircuitBreakersThresholds(
        max_connections=_UNLIMITED, max_pending_requests=_UNLIMITED, max_requests=_UNLIMITED, max_retries=_UNLIMITED
    )
    return commented(
        cluster.CircuitBreakers(thresholds=[thresholds]),
        "Streams that last minutes soon reach Envoy's default of 1024. The service decides how many\n"
        "requests are admitted. The same applies to all clusters.",
    )
