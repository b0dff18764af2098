"""The three listeners: the front door, the place where requests are placed, and the prefill leg."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
from envoy_data_plane.envoy.config.core.v3 import Address, HttpProtocolOptions, SocketAddress
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener, ListenerInternalListenerConfig
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpFilter,
    LocalReplyConfig,
)
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import Config, Supervise, TruncatedStreams
from dp_extproc.envoy_config.access_log import log_prefill_legs, log_requests
from dp_extproc.envoy_config.cluster_names import DISPATCH, PREFILL_LEG
from dp_extproc.envoy_config.external_processing import (
    place_requests,
    remember_owner,
    report_prefill,
)
from dp_extproc.envoy_config.headers import strip_client_headers
from dp_extproc.envoy_config.limits import MAX_HEADERS_COUNT, MAX_HEADERS_KB, buffer_bytes
from dp_extproc.envoy_config.local_replies import build_local_replies
from dp_extproc.envoy_config.prefix_swap import swap_prefix
from dp_extproc.envoy_config.routes import to_dispatch, to_engines, to_prefill
from dp_extproc.envoy_config.stream_end import build_decode_listener, remember_decode_host

INFERENCE: Final = "inference"
_NO_TIMEOUT: Final = timedelta(0)
_CLOSE_DELAY: Final = timedelta(milliseconds=50)
"""How long a client that still sends its body has for reading an early answer. By default each hop waits for a second
before it closes, and so would every client whose answer was cut off."""


def build_listeners(config: Config) -> list[Listener]:
    """Build all listeners, in the order in which a request passes them."""
    settings = config.envoy
    buffer = buffer_bytes(settings)
    replies = build_local_replies(settings.max_body_bytes)
    repeated = build_local_replies(settings.max_body_bytes, retries=config.retry.attempts > 1)
    front_door = HttpConnectionManager(
        stat_prefix=INFERENCE,
        route_config=to_dispatch(config.retry),
        http_filters=[_router()],
        stream_idle_timeout=_NO_TIMEOUT,
        request_headers_timeout=timedelta(seconds=settings.request_headers_timeout),
        request_timeout=timedelta(seconds=settings.request_timeout),
        delayed_close_timeout=_CLOSE_DELAY,
        use_remote_address=True,
        early_header_mutation_extensions=[strip_client_headers(settings.session_header)],
        generate_request_id=True,
        preserve_external_request_id=True,
        local_reply_config=replies,
    )
    supervision = config.supervision.mode
    watching = [remember_owner()] if supervision is Supervise.FIRST_EVENT else []
    ends_streams = settings.truncated_streams is TruncatedStreams.ERROR_EVENT
    handing_on = [remember_decode_host()] if ends_streams else []
    dispatch = _internal_manager(
        DISPATCH,
        to_engines(supervision, settings.body_mode),
        [place_requests(config), *watching, *handing_on],
        log_requests(),
        repeated,
    )
    prefill_leg = _internal_manager(
        PREFILL_LEG, to_prefill(), [remember_owner(), swap_prefix(), report_prefill(supervision)], log_prefill_legs()
    )
    inference = settings.inference
    return [
        Listener(
            name=INFERENCE,
            address=Address(socket_address=SocketAddress(address=inference.host, port_value=inference.port)),
            filter_chains=[_chain(front_door)],
            per_connection_buffer_limit_bytes=buffer,
        ),
        *(
            Listener(
                name=manager.stat_prefix,
                filter_chains=[_chain(manager)],
                per_connection_buffer_limit_bytes=buffer,
                internal_listener=ListenerInternalListenerConfig(),
            )
            for manager in (dispatch, prefill_leg)
        ),
        *([build_decode_listener(buffer)] if ends_streams else []),
    ]


def _internal_manager(
    name: str,
    routes: RouteConfiguration,
    filters: Sequence[HttpFilter],
    access_log: AccessLog,
    replies: LocalReplyConfig | None = None,
) -> HttpConnectionManager:
    return HttpConnectionManager(
        stat_prefix=name,
        route_config=routes,
        http_filters=[*filters, _router()],
        common_http_protocol_options=HttpProtocolOptions(max_headers_count=MAX_HEADERS_COUNT),
        max_request_headers_kb=MAX_HEADERS_KB,
        stream_idle_timeout=_NO_TIMEOUT,
        delayed_close_timeout=_CLOSE_DELAY,
        access_log=[access_log],
        local_reply_config=replies,
    )


def _router() -> HttpFilter:
    return HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(Router(suppress_envoy_headers=True)))


def _chain(manager: HttpConnectionManager) -> FilterChain:
    return FilterChain(
        filters=[Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(manager))]
    )
