"""The front door: the listener for clients. Another gateway may take its place."""

from datetime import timedelta

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener import v3 as listener
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm

from dp_extproc.config import Config
from dp_extproc.envoy_config.filters import strip_client_headers
from dp_extproc.envoy_config.listeners import CLOSE_DELAY, NO_TIMEOUT, buffer_bytes, network_filter, router
from dp_extproc.envoy_config.local_replies import build_local_replies
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.routes import table, to_dispatch
from dp_extproc.envoy_config.yaml_text import commented


def build_front_door(config: Config) -> listener.Listener:
    """Build the listener for clients, the only one with a port. Another gateway may take its place."""
    settings, names = config.envoy, Names.of(config)
    manager = commented(
        hcm.HttpConnectionManager(
            stat_prefix=names.inference,
            route_config=table(to_dispatch(names, config.retry)),
            http_filters=[router()],
            stream_idle_timeout=NO_TIMEOUT,
            request_headers_timeout=timedelta(seconds=settings.request_headers_timeout),
            request_timeout=timedelta(seconds=settings.request_timeout),
            delayed_close_timeout=CLOSE_DELAY,
            use_remote_address=True,
            early_header_mutation_extensions=[strip_client_headers()],
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
            name=names.inference,
            address=core.Address(socket_address=address),
            filter_chains=[listener.FilterChain(filters=[network_filter(manager)])],
            per_connection_buffer_limit_bytes=buffer_bytes(settings),
        ),
        "The front door. It is a hop of its own, so that it can repeat a failed attempt, which is\n"
        "then scheduled again.",
        per_connection_buffer_limit_bytes="envoy.max_body_bytes and 1 MiB for the routing fields. Every hop needs\n"
        "it, because it may buffer a whole body; Envoy's default is 1 MiB.",
    )
