"""The front door: the listener for clients. Another gateway may take its place."""

from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener import v3 as listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.http.cors import v3 as cors
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatcher, StringMatcher

from dp_extproc.config import Config, EnvoySettings, SocketAddress
from dp_extproc.config.front_door import CorsSettings
from dp_extproc.envoy_config.filters import allow_asked_headers, strip_client_headers
from dp_extproc.envoy_config.listeners import CLOSE_DELAY, EVERY_HOP, NO_TIMEOUT, buffer_bytes, network_filter, router
from dp_extproc.envoy_config.local_replies import build_local_replies
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.routes import table, to_dispatch
from dp_extproc.envoy_config.telemetry import access_logs, trace
from dp_extproc.envoy_config.tls import for_clients
from dp_extproc.envoy_config.yaml_text import commented, pack

CORS_FILTER: Final = "envoy.filters.http.cors"
_CORS_HEADERS: Final = tuple(
    f"access-control-{name}"
    for name in (
        "allow-credentials", "allow-headers", "allow-methods", "allow-origin", "allow-private-network",
        "expose-headers", "max-age",
    )
)  # fmt: skip
"""Headers of a response by which browsers decide. Envoy sets them itself, after those of engines were removed."""
_REFUSED: Final = {
    "leg": "front_door",
    **EVERY_HOP,
    "protocol": "%PROTOCOL%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
}
"""Fields in the access log of requests that the front door itself refuses."""
_HOST_FOR_HTTP_10: Final = "dp-extproc"
"""Value of ``:authority`` for a request of HTTP/1.0 without one. Envoy's routes need it, and none of ours reads it."""


def build_front_door(config: Config) -> listener.Listener:
    """Build the listener for clients, the only one with a port. Another gateway may take its place."""
    settings, names = config.envoy, Names.of(config)
    manager = commented(
        hcm.HttpConnectionManager(
            stat_prefix=names.inference,
            route_config=build_routes(config),
            http_filters=[*_cors_filters(settings.cors), router()],
            http_protocol_options=_http1(settings),
            stream_idle_timeout=NO_TIMEOUT,
            request_headers_timeout=timedelta(seconds=settings.request_headers_timeout),
            request_timeout=timedelta(seconds=settings.request_timeout),
            delayed_close_timeout=CLOSE_DELAY,
            use_remote_address=True,
            early_header_mutation_extensions=[strip_client_headers()],
            generate_request_id=True,
            preserve_external_request_id=True,
            access_log=access_logs(config, _REFUSED, _only_refused()),
            local_reply_config=build_local_replies(settings.max_body_bytes, is_front_door=True),
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
        access_log="A line for each request that the front door itself refuses. Others have theirs further on.",
        preserve_external_request_id="The request id of a client appears in all logs.",
    )
    trace(config, manager, "front_door")
    chain = listener.FilterChain(filters=[network_filter(manager)], transport_socket=for_clients(config))
    return commented(
        listener.Listener(
            name=names.inference,
            address=to_listen_on(settings.inference, ipv4_compat=settings.ipv4_compat),
            filter_chains=[chain],
            per_connection_buffer_limit_bytes=buffer_bytes(settings),
        ),
        "The front door. It is a hop of its own, so that it can repeat a failed attempt, which is\n"
        "then scheduled again.",
        per_connection_buffer_limit_bytes="envoy.max_body_bytes and 1 MiB for the routing fields. Every hop needs\n"
        "it, because it may buffer a whole body; Envoy's default is 1 MiB.",
    )


def _http1(settings: EnvoySettings) -> core.Http1ProtocolOptions:
    http1 = core.Http1ProtocolOptions(ignore_http_11_upgrade=[StringMatcher(safe_regex=RegexMatcher(regex=".*"))])
    if settings.accept_http_10:
        http1.accept_http_10 = True
        http1.default_host_for_http_10 = _HOST_FOR_HTTP_10
    return commented(
        http1,
        ignore_http_11_upgrade="Clients may offer Upgrade: TLS/1.2 or h2c with any request. Engines ignore the offer,\n"
        "and Envoy would answer 403.",
    )


def _cors_filters(settings: CorsSettings | None) -> list[hcm.HttpFilter]:
    if settings is None:
        return []
    filters = [hcm.HttpFilter(name=CORS_FILTER, typed_config=pack(cors.Cors()))]
    if settings.allows_all_headers:
        filters.append(allow_asked_headers())
    return filters


def _only_refused() -> accesslog.AccessLogFilter:
    """Build the filter of the responses that this listener has made itself, without those to preflight requests."""
    own = ExpressionFilter(expression='response.code >= 400 && response.code_details != "via_upstream"')
    extension = accesslog.ExtensionFilter(name="envoy.access_loggers.extension_filters.cel", typed_config=pack(own))
    return accesslog.AccessLogFilter(extension_filter=extension)


def build_routes(config: Config) -> RouteConfiguration:
    """Build the routes of the front door: into the block, for the web pages that may send requests."""
    routes, settings = table(to_dispatch(Names.of(config), config.retry)), config.envoy.cors
    if settings is not None:
        host = routes.virtual_hosts[0]
        host.typed_per_filter_config = {CORS_FILTER: pack(_cors_policy(settings))}
        host.response_headers_to_remove = list(_CORS_HEADERS)
        commented(host, response_headers_to_remove="What engines answer: SGLang and vLLM allow every origin.")
    return routes


def to_listen_on(address: SocketAddress, *, ipv4_compat: bool) -> core.Address:
    """Build the address of a listener. With *ipv4_compat* one on ``[::]`` accepts IPv4, too."""
    socket = core.SocketAddress(address=address.host, port_value=address.port)
    socket.ipv4_compat = ipv4_compat and address.host == "::"
    return core.Address(socket_address=socket)


def _cors_policy(settings: CorsSettings) -> cors.CorsPolicy:
    return cors.CorsPolicy(
        allow_origin_string_match=[
            StringMatcher(safe_regex=RegexMatcher(regex=".*")) if origin == "*" else StringMatcher(exact=origin)
            for origin in settings.allow_origins
        ],
        allow_methods="GET, POST, PUT, DELETE, OPTIONS",
        allow_headers=", ".join(settings.allow_headers),
        expose_headers=", ".join(settings.expose_headers),
        max_age=f"{round(settings.max_age)}",
        allow_credentials=settings.allow_credentials,
        # By default Envoy asks an engine about the preflight request of an origin that is not allowed.
        forward_not_matching_preflights=False,
    )
