"""The internal listeners for scheduling, prefill legs and decode."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener import v3 as listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm

from dp_extproc import contract
from dp_extproc.config import Config, EnvoySettings, Supervise, TruncatedStreams
from dp_extproc.envoy_config.filters import (
    http_filter,
    remember_owner,
    report_prefill,
    schedule_requests,
    strip_before_scheduling,
)
from dp_extproc.envoy_config.local_replies import build_local_replies
from dp_extproc.envoy_config.lua_filters import swap_leg_preamble
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.routes import to_engines, to_prefill
from dp_extproc.envoy_config.stream_end import remember_decode_endpoint, stream_end_filters
from dp_extproc.envoy_config.telemetry import access_logs, trace
from dp_extproc.envoy_config.yaml_text import commented, pack

_MAX_HEADERS_KB: Final = 1024
"""Limit of all request headers of the internal listeners, in KiB. Envoy's default of 60 would refuse large batches.

The leg preamble of the prefill leg is a header. For each prompt of a batch it has a bootstrap room (up to 19 digits)
and a request id (about 35 bytes). So 1 MiB is enough for more than 15,000 prompts. Envoy allows 8192 KiB.
"""

_MAX_HEADERS_COUNT: Final = 200
"""Most headers of a request at the internal listeners: 100 of a client (Envoy's default), and those of the service."""

NO_TIMEOUT: Final = timedelta(0)
CLOSE_DELAY: Final = timedelta(milliseconds=50)
"""Time for a client that still sends its body to read an early response. Envoy's default of 1 s for each hop would
delay the end of every truncated response as well."""

EVERY_HOP: Final = {
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
"""Fields in the access log of every listener."""

_DECISION: Final = (
    contract.META_MODEL,
    contract.META_POOL,
    contract.META_GROUP,
    contract.META_PREFILL_HOST,
    contract.META_PREFILL_RANK,
    contract.META_DECODE_HOST,
    contract.META_DECODE_RANK,
    contract.META_REASON,
)
"""Keys of the decision, or of the reason of a refusal, in Envoy's metadata."""

_MAIN: Final = {
    "leg": "main",
    **EVERY_HOP,
    "client": "%REQ(x-forwarded-for)%",
    **{key: f"%DYNAMIC_METADATA({contract.METADATA_NAMESPACE}:{key})%" for key in _DECISION},
}
"""Fields in the access log of requests."""
_PREFILL: Final = {"leg": "prefill", **EVERY_HOP, contract.META_PREFILL_HOST: "%UPSTREAM_HOST%"}
"""Fields in the access log of prefill legs, whose ``request_id`` is that of their request."""


def buffer_bytes(settings: EnvoySettings) -> int:
    """Return the buffer of every hop in bytes: the largest body and the routing fields that rewriting adds.

    These fields are no longer than a header may be. The service itself refuses a body above ``max_body_bytes``. Envoy's
    own 413 stops only what exceeds both.
    """
    return settings.max_body_bytes + _MAX_HEADERS_KB * 1024


def build_internal_listeners(config: Config) -> list[listener.Listener]:
    """Build the listeners behind the front door, in the order in which requests pass them."""
    settings, names = config.envoy, Names.of(config)
    buffer = buffer_bytes(settings)
    supervision = config.supervision.mode
    ends_streams = settings.truncated_streams is TruncatedStreams.ERROR_EVENT
    filters = [schedule_requests(config)]
    if supervision is Supervise.FIRST_EVENT:
        filters.append(remember_owner())
    if ends_streams:
        filters.append(remember_decode_endpoint())
    replies = build_local_replies(settings.max_body_bytes, retries=config.retry.attempts > 1)
    routes = to_engines(config)
    dispatch = _internal_http(
        config, names.dispatch, routes, filters, _MAIN, replies=replies, mutations=[strip_before_scheduling()]
    )
    comment = "Schedules requests. An internal listener has no port."
    listeners = [_internal_listener(names.dispatch, [dispatch], buffer, comment)]
    if not config.sends_legs:
        owner = commented(remember_owner(), "The report below opens after the x-dp-* headers were removed.")
        prefill_leg = _internal_http(
            config,
            names.prefill_leg,
            to_prefill(names),
            [owner, swap_leg_preamble(), report_prefill(names, supervision)],
            _PREFILL,
        )
        comment = "The mirrored copy, as a request with its own body, status and log line."
        listeners.append(_internal_listener(names.prefill_leg, [prefill_leg], buffer, comment))
    if ends_streams:
        decode = _internal_listener(
            names.decode,
            stream_end_filters(names),
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
    config: Config,
    name: str,
    routes: RouteConfiguration,
    filters: Sequence[hcm.HttpFilter],
    logged: Mapping[str, str],
    *,
    replies: hcm.LocalReplyConfig | None = None,
    mutations: Sequence[core.TypedExtensionConfig] = (),
) -> listener.Filter:
    manager = commented(
        hcm.HttpConnectionManager(
            stat_prefix=name,
            route_config=routes,
            http_filters=[*filters, router()],
            common_http_protocol_options=core.HttpProtocolOptions(max_headers_count=_MAX_HEADERS_COUNT),
            max_request_headers_kb=_MAX_HEADERS_KB,
            stream_idle_timeout=NO_TIMEOUT,
            delayed_close_timeout=CLOSE_DELAY,
            early_header_mutation_extensions=list(mutations),
            access_log=access_logs(config, logged),
            local_reply_config=replies,
        ),
        common_http_protocol_options="100 headers of the client, and those that the service adds.",
        early_header_mutation_extensions="Removes untrusted headers once more: another front door may not do so.",
        max_request_headers_kb="The prefill leg's preamble is a header, with some 60 bytes for each prompt of\n"
        "a batch. Envoy's default is 60 KiB.",
    )
    trace(config, manager, logged["leg"], _DECISION if logged is _MAIN else ())
    return network_filter(manager)


def router() -> hcm.HttpFilter:
    comment = "No x-envoy-* headers for clients and engines."
    return http_filter("router", commented(Router(suppress_envoy_headers=True), suppress_envoy_headers=comment))


def network_filter(manager: hcm.HttpConnectionManager) -> listener.Filter:
    return listener.Filter(name="envoy.filters.network.http_connection_manager", typed_config=pack(manager))
