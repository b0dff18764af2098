"""Where Envoy sends things: the service, the engines (named by header), and its own internal listeners."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterCommonLbConfig,
    ClusterDiscoveryType,
    ClusterLbPolicy,
    ClusterOriginalDstLbConfig,
    OutlierDetection,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    EnvoyInternalAddress,
    HealthCheck,
    HealthCheckGrpcHealthCheck,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    KeepaliveSettings,
    SocketAddress,
    TransportSocket,
)
from envoy_data_plane.envoy.config.core.v3 import HttpProtocolOptions as CommonHttpProtocolOptions
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.transport_sockets.internal_upstream.v3 import InternalUpstreamTransport
from envoy_data_plane.envoy.extensions.transport_sockets.raw_buffer.v3 import RawBuffer
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.envoy.type.v3 import Percent
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import Config, Supervise, TruncatedStreams
from dp_extproc.contract import DECODE_HOST, OWNER, PREFILL_HOST
from dp_extproc.envoy_config.cluster_names import (
    DECODE,
    DECODE_SERVER,
    DISPATCH,
    PREFILL,
    PREFILL_LEG,
    SERVICE,
    SERVICE_OWNER,
)
from dp_extproc.envoy_config.external_processing import see_first_event
from dp_extproc.envoy_config.failed_hosts import remember_failed_hosts
from dp_extproc.envoy_config.headers import (
    last_upstream_filter,
    strip_headers_before_placement,
    strip_router_headers,
)
from dp_extproc.envoy_config.limits import UNLIMITED, buffer_bytes
from dp_extproc.envoy_config.service_addresses import is_named, may_be_several, services_of
from dp_extproc.envoy_config.tls import speak_tls

_CONNECT_TIMEOUT: Final = timedelta(seconds=2)
"""Linux repeats a lost SYN after one second, so one loss is survived and a dead host is still noticed soon."""

_ENGINE_IDLE_TIMEOUT: Final = timedelta(seconds=4)
"""Engines answer over uvicorn, which closes a connection after 5 idle seconds (``timeout_keep_alive``)."""

_READINESS_CHECK: Final = HealthCheck(
    timeout=timedelta(seconds=1),
    interval=timedelta(seconds=1),
    no_traffic_interval=timedelta(seconds=1),  # by default a service that gets no traffic is looked at once a minute
    unhealthy_threshold=2,
    healthy_threshold=1,
    grpc_health_check=HealthCheckGrpcHealthCheck(),
)
"""Which of several services gets the requests: one that hangs is left after two seconds, one that stops within one."""

_DEAD_PROCESS: Final = OutlierDetection(
    split_external_local_origin_errors=True,
    consecutive_local_origin_failure=1,
    max_ejection_percent=100,
    base_ejection_time=timedelta(seconds=3),  # until the health check knows, too; its success ends this at once
    interval=timedelta(milliseconds=500),
)
"""A process that has died is left with the first connection that it refuses, not with the next health check."""

_LARGEST_WINDOW: Final = (1 << 31) - 1
"""Of a stream in HTTP/2 (RFC 9113, 6.9.1). Envoy takes the window that it offers for its own buffer's limit, too.

A filter of a cluster that reports over a stream whose buffer is full (16 MiB by default) kills Envoy when the request
ends: the stream's end has the filter read on from an engine that was let go just before (1.38 to 1.40 measured).
Without that limit the filter stops by itself, at that of its cluster's buffer, and nothing happens then.
"""

_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def build_clusters(config: Config) -> list[Cluster]:
    """Build all clusters; none of them knows an engine by name."""
    buffer = buffer_bytes(config.envoy)
    remembering = [remember_failed_hosts()] if config.retry.attempts > 1 else []
    watching = [see_first_event(config.envoy.body_mode)] if config.supervision.mode is Supervise.FIRST_EVENT else []
    owner = _grpc(config.listen.keepalive, stream_window=_LARGEST_WINDOW)
    return [
        _service(config, buffer),
        _by_header(SERVICE_OWNER, OWNER, owner, buffer, speak_tls(config.envoy.service_tls)),
        _by_header(PREFILL, PREFILL_HOST, _engine(), buffer),
        *_decode(config.envoy.truncated_streams, _engine(watching), buffer),
        _internal(DISPATCH, buffer, _http([strip_headers_before_placement(), *remembering, last_upstream_filter()])),
        _internal(PREFILL_LEG, buffer),
    ]


def _service(config: Config, buffer: int) -> Cluster:
    """Build the cluster of the service: its workers in turn; and the next service once none of them is healthy."""
    workers = config.listen.workers
    services = services_of(config)
    named = is_named(config)
    cluster = Cluster(
        name=SERVICE,
        type=ClusterDiscoveryType.STRICT_DNS if named else ClusterDiscoveryType.STATIC,
        connect_timeout=_CONNECT_TIMEOUT,
        per_connection_buffer_limit_bytes=buffer,
        load_assignment=ClusterLoadAssignment(
            cluster_name=SERVICE,
            endpoints=[
                LocalityLbEndpoints(
                    priority=priority,
                    lb_endpoints=[_endpoint(_socket_address(host, port + worker)) for worker in range(workers)],
                )
                for priority, (host, port) in enumerate(services)
            ],
        ),
        circuit_breakers=_unlimited(),
        typed_extension_protocol_options={_HTTP_OPTIONS: Any.pack(_grpc(config.listen.keepalive))},
        transport_socket=speak_tls(config.envoy.service_tls),
    )
    if may_be_several(config):
        cluster.health_checks = [_READINESS_CHECK]
        cluster.outlier_detection = _DEAD_PROCESS
        # If all are unhealthy one of them is asked nevertheless: it knows what is wrong. By default half would do.
        cluster.common_lb_config = ClusterCommonLbConfig(
            healthy_panic_threshold=Percent(value=1.0),
            update_merge_window=timedelta(0),  # by default changes of health are held back for a second
        )
    return cluster


def _socket_address(host: str, port: int) -> Address:
    return Address(socket_address=SocketAddress(address=host, port_value=port))


def _by_header(
    name: str, header: str, options: HttpProtocolOptions, buffer: int, transport: TransportSocket | None = None
) -> Cluster:
    cluster = _at_a_given_address(name, buffer)
    cluster.typed_extension_protocol_options = {_HTTP_OPTIONS: Any.pack(options)}
    cluster.original_dst_lb_config = ClusterOriginalDstLbConfig(use_http_header=True, http_header_name=header)
    cluster.transport_socket = transport
    return cluster


def _at_a_given_address(name: str, buffer: int) -> Cluster:
    """Build a cluster without hosts: by default it is the address that the connection was opened for."""
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.ORIGINAL_DST,
        connect_timeout=_CONNECT_TIMEOUT,
        per_connection_buffer_limit_bytes=buffer,
        lb_policy=ClusterLbPolicy.CLUSTER_PROVIDED,
        circuit_breakers=_unlimited(),
    )


def _decode(truncated_streams: TruncatedStreams, options: HttpProtocolOptions, buffer: int) -> list[Cluster]:
    """Build the way to the answering servers: straight, or through the listener that ends their streams."""
    if truncated_streams is TruncatedStreams.RESET:
        return [_by_header(DECODE, DECODE_HOST, options, buffer)]
    return [_internal(DECODE, buffer, options), _at_a_given_address(DECODE_SERVER, buffer)]


def _internal(listener: str, buffer: int, options: HttpProtocolOptions | None = None) -> Cluster:
    plain = TransportSocket(name="envoy.transport_sockets.raw_buffer", typed_config=Any.pack(RawBuffer()))
    return Cluster(
        name=listener,
        type=ClusterDiscoveryType.STATIC,
        per_connection_buffer_limit_bytes=buffer,
        load_assignment=_single_endpoint(
            listener, Address(envoy_internal_address=EnvoyInternalAddress(server_listener_name=listener))
        ),
        circuit_breakers=_unlimited(),
        typed_extension_protocol_options={_HTTP_OPTIONS: Any.pack(options)} if options else {},
        transport_socket=TransportSocket(
            name="envoy.transport_sockets.internal_upstream",
            typed_config=Any.pack(InternalUpstreamTransport(transport_socket=plain)),
        ),
    )


def _single_endpoint(cluster: str, address: Address) -> ClusterLoadAssignment:
    return ClusterLoadAssignment(
        cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=[_endpoint(address)])]
    )


def _endpoint(address: Address) -> LbEndpoint:
    return LbEndpoint(endpoint=Endpoint(address=address))


def _grpc(keepalive: float, *, stream_window: int | None = None) -> HttpProtocolOptions:
    patience = timedelta(seconds=keepalive)
    http2 = Http2ProtocolOptions(
        initial_stream_window_size=stream_window,
        connection_keepalive=KeepaliveSettings(interval=patience, timeout=patience),
    )
    return HttpProtocolOptions(explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2))


def _http(filters: Sequence[HttpFilter]) -> HttpProtocolOptions:
    return HttpProtocolOptions(
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions()),
        http_filters=list(filters),
    )


def _engine(filters: Sequence[HttpFilter] = ()) -> HttpProtocolOptions:
    return HttpProtocolOptions(
        common_http_protocol_options=CommonHttpProtocolOptions(idle_timeout=_ENGINE_IDLE_TIMEOUT),
        explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions()),
        http_filters=[strip_router_headers(), *filters, last_upstream_filter()],
    )


def _unlimited() -> CircuitBreakers:
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=UNLIMITED,
                max_pending_requests=UNLIMITED,
                max_requests=UNLIMITED,
                max_retries=UNLIMITED,
            )
        ]
    )
