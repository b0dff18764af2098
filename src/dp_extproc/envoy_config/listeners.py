"""The listeners: the front door for clients, and the internal ones for scheduling, prefill legs and decode."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener import v3 as listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.google.protobuf import Struct

from dp_extproc import contract
from dp_extproc.config import Config, EnvoySettings, Supervise, TruncatedStreams
from dp_extproc.envoy_config.addresses import DECODE, DISPATCH, PREFILL_LEG
from dp_extproc.envoy_config.filters import (
    http_filter,
    remember_owner,
    report_prefill,
    schedule_requests,
    strip_client_headers,
)
from dp_extproc.envoy_config.local_replies import build_local_replies
from dp_extproc.envoy_config.lua_filters import swap_leg_preamble
from dp_extproc.envoy_config.routes import to_dispatch, to_engines, to_prefill
from dp_extproc.envoy_config.stream_end import remember_decode_endpoint, stream_end_filters
from dp_extproc.envoy_config.yaml_text import commented, pack

_MAX_HEADERS_KB: Final = 1024
"""Limit of all request headers of the internal listeners, in KiB. Envoy's default of 60 would refuse large batches.

The leg preamble of the prefill leg is a header. For each prompt of a batch it has a bootstrap room (up to 19 digits)
and a request id (about 35 bytes). So 1 MiB is enough for more than 15,000 prompts. Envoy allows 8192 KiB.
"""

_MAX_HEADERS_COUNT: Final = 200
"""Most headers of a request at the internal listeners: 100 of a client (Envoy's default), and those of the service."""

INFERENCE: Final = "inference"
_NO_TIMEOUT: Final = timedelta(0)
_CLOSE_DELAY: Final = timedelta(milliseconds=50)
"""Time for a client that still sends its body to read an early response. Envoy's default of 1 s for each hop would
delay the end of every truncated response as well."""

_EVERY_HOP: Final = {
    "time": "%START_TIME%",
    "request_id": "%REQ(x-request-id)%",
    "method": "%REQ(:method)%",
    "path": "%REQ(:path)%",
    "status": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
}

_DECISION: Final = {
    key: f"%DYNAMIC_METADATA({contract.METADATA_NAMESPACE}:{key})%"
    for key in (
        contract.META_MODEL,
        contract.META_POOL,
        contract.META_GROUP,
        contract.META_PREFILL_HOST,
        contract.META_PREFILL_RANK,
        contract.META_DECODE_HOST,
        contract.META_DECODE_RANK,
        contract.META_REASON,
    )
}


def buffer_bytes(settings: EnvoySettings) -> int:
    """Return the buffer of every hop in bytes: the largest body and the routing fields that rewriting adds.

    These fields are no longer than a header may be. The service itself refuses a body above ``max_body_bytes``. Envoy's
    own 413 stops only what exceeds both.
    """
    return settings.max_body_bytes + _MAX_HEADERS_KB * 1024


def build_front_door(config: Config) -> listener.Listener:
    """Build the listener for clients, the only one with a port. Another gateway may take its place."""
    settings = config.envoy
    manager = commented(
        hcm.HttpConnectionManager(
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
            local_reply_config=build_local_replies(settings.max_body_bytes),
        ),
        stream_idle_timeout="A stream may be idle for as long as the engine processes its prompt.",
        request_headers_timeout="envoy.request_headers_timeout.",
        request_timeout="envoy.request_timeout: a client that stops within its body would hold buffers forever.\n"
        "The timeout ends with the last byte of the request; it does not limit the response.",
        delayed_close_timeout="Envoy's default would delay the end of a truncated response by a second.",
        use_remote_address="Adds the client's address to x-forwarded-for, from where the access log takes it.",
        early_header_mutation_extensions="Removes untrusted headers before anything reads them. A client could\n"
        "name any address in x-dp-decode-host. In SGLang, x-data-parallel-rank and x-override-* take precedence\n"
        "over the body.",
        preserve_external_request_id="The request id of a client appears in all logs.",
    )
    address = core.SocketAddress(address=settings.inference.host, port_value=settings.inference.port)
    return commented(
        listener.Listener(
            name=INFERENCE,
            address=core.Address(socket_address=address),
            filter_chains=[listener.FilterChain(filters=[_network_filter(manager)])],
            per_connection_buffer_limit_bytes=buffer_bytes(settings),
        ),
        "The front door. It is a hop of its own, so that it can repeat a failed attempt, which is\n"
        "then scheduled again.",
        per_connection_buffer_limit_bytes="envoy.max_body_bytes and 1 MiB for the routing fields. Every hop needs\n"
        "it, because it may buffer a whole body; Envoy's default is 1 MiB.",
    )


def build_internal_listeners(config: Config) -> list[listener.Listener]:
    """Build the listeners behind the front door, in the order in which requests pass them."""
    settings = config.envoy
    buffer = buffer_bytes(settings)
    supervision = config.supervision.mode
    ends_streams = settings.truncated_streams is TruncatedStreams.ERROR_EVENT
    filters = [schedule_requests(config)]
    if supervision is Supervise.FIRST_EVENT:
        filters.append(remember_owner())
    if ends_streams:
        filters.append(remember_decode_endpoint())
    replies = build_local_replies(settings.max_body_bytes, retries=config.retry.attempts > 1)
    routes = to_engines(supervision, settings.body_mode)
    dispatch = _internal_http(DISPATCH, routes, filters, _log_requests(), replies)
    owner = commented(remember_owner(), "The report below opens after the x-dp-* headers were removed.")
    prefill_leg = _internal_http(
        PREFILL_LEG, to_prefill(), [owner, swap_leg_preamble(), report_prefill(supervision)], _log_prefill_legs()
    )
    comment = "The mirrored copy, as a request with its own body, status and log line."
    listeners = [
        _internal_listener(DISPATCH, [dispatch], buffer, "Schedules requests. An internal listener has no port."),
        _internal_listener(PREFILL_LEG, [prefill_leg], buffer, comment),
    ]
    if ends_streams:
        decode = _internal_listener(
            DECODE,
            stream_end_filters(),
            buffer,
            "Forwards the bytes of responses. If an engine is lost in mid-stream, the filter appends an error\n"
            "event; Envoy's HTTP router itself could only reset the client's connection.",
        )
        listeners.append(decode)
    return listeners


def _internal_listener(name: str, filters: list[listener.Filter], buffer: int, comment: str) -> listener.Listener:
    internal = listener.Listener(
        name=name,
        filter_chains=[listener.FilterChain(filters=filters)],
        per_connection_buffer_limit_bytes=buffer,
        internal_listener=listener.ListenerInternalListenerConfig(),
    )
    return commented(internal, comment)


def _internal_http(
    name: str,
    routes: RouteConfiguration,
    filters: Sequence[hcm.HttpFilter],
    access_log: AccessLog,
    replies: hcm.LocalReplyConfig | None = None,
) -> listener.Filter:
    manager = commented(
        hcm.HttpConnectionManager(
            stat_prefix=name,
            route_config=routes,
            http_filters=[*filters, _router()],
            common_http_protocol_options=core.HttpProtocolOptions(max_headers_count=_MAX_HEADERS_COUNT),
            max_request_headers_kb=_MAX_HEADERS_KB,
            stream_idle_timeout=_NO_TIMEOUT,
            delayed_close_timeout=_CLOSE_DELAY,
            access_log=[access_log],
            local_reply_config=replies,
        ),
        common_http_protocol_options="100 headers of the client, and those that the service adds.",
        max_request_headers_kb="The prefill leg's preamble is a header, with some 60 bytes for each prompt of\n"
        "a batch. Envoy's default is 60 KiB.",
    )
    return _network_filter(manager)


def _router() -> hcm.HttpFilter:
    comment = "No x-envoy-* headers for clients and engines."
    return http_filter("router", commented(Router(suppress_envoy_headers=True), suppress_envoy_headers=comment))


def _network_filter(manager: hcm.HttpConnectionManager) -> listener.Filter:
    return listener.Filter(name="envoy.filters.network.http_connection_manager", typed_config=pack(manager))


def _log_requests() -> AccessLog:
    """Build the log of requests: each with its decision, or with the reason of its refusal."""
    return _stdout({"leg": "main", **_EVERY_HOP, "client": "%REQ(x-forwarded-for)%", **_DECISION})


def _log_prefill_legs() -> AccessLog:
    """Build the log of prefill legs, whose ``request_id`` is that of their request."""
    return _stdout({"leg": "prefill", **_EVERY_HOP, contract.META_PREFILL_HOST: "%UPSTREAM_HOST%"})


def _stdout(fields: Mapping[str, str]) -> AccessLog:
    line = core.SubstitutionFormatString(json_format=Struct.from_dict(fields))
    return AccessLog(name="envoy.access_loggers.stdout", typed_config=pack(StdoutAccessLog(log_format=line)))
