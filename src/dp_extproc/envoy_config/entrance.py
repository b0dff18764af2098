"""What a listener of another gateway needs to lead requests into the block, without effects on its other routes.

The printed front door has a connection manager of its own and removes untrusted headers before anything reads them. A
gateway shares one connection manager between routes, so there the same removal is a filter that acts on one route only:

1. :func:`strip_filter` belongs once into the HTTP filters of the connection manager, directly before the router.
2. :func:`entrance_route` enables it, buffers large bodies for retries, and leads to the block.
3. :func:`~.block.build_bootstrap_extension` belongs into the bootstrap, exactly once.
"""

from collections.abc import Mapping
from typing import Final

from envoy_data_plane.envoy.config.route.v3 import Route
from envoy_data_plane.envoy.extensions.filters.http.header_mutation import v3 as header_mutation
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import Config
from dp_extproc.envoy_config.filters import removed_from_clients
from dp_extproc.envoy_config.listeners import buffer_bytes
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.routes import to_dispatch
from dp_extproc.envoy_config.yaml_text import commented, pack

STRIP_FILTER: Final = "strip_client_headers"
"""Name of the filter behind the prefix. A gateway may have filters of the same type under other names."""


def strip_filter(config: Config) -> HttpFilter:
    """Build the HTTP filter of a shared connection manager that removes untrusted headers on our route only.

    It belongs directly before the router: a filter before it may still change the route, and whatever such filters
    read stays as it was. The router reads ``x-envoy-*`` headers of the client for timeouts and retries, so the removal
    has to come before. On routes that do not enable it, the filter is not even created.
    """
    return commented(
        HttpFilter(name=_strip_filter_name(config), typed_config=pack(header_mutation.HeaderMutation()), disabled=True),
        "Directly before the router. It removes untrusted headers on the route that enables it, and is not created\n"
        "for requests of other routes.",
    )


def strip_on_route(config: Config) -> Mapping[str, Any]:
    """Build the ``typed_per_filter_config`` of a route that enables :func:`strip_filter` there."""
    removed = header_mutation.Mutations(request_mutations=removed_from_clients())
    return {_strip_filter_name(config): pack(header_mutation.HeaderMutationPerRoute(mutations=removed))}


def entrance_route(config: Config) -> Route:
    """Build the route of a shared connection manager into the block, which leaves all other routes as they are.

    It matches every path. A gateway with further conditions replaces the ``match``.
    """
    route = to_dispatch(Names.of(config), config.retry)
    route.typed_per_filter_config = dict(strip_on_route(config))
    route.request_body_buffer_limit = buffer_bytes(config.envoy)
    return commented(
        route,
        "The way into the block.",
        typed_per_filter_config="Removes untrusted headers before the router reads them, here only.",
        request_body_buffer_limit="A body above the limit would not be retried. Without this setting, the listener's\n"
        "per_connection_buffer_limit_bytes is the limit (1 MiB by default, 32 KiB in some gateways).",
    )


def _strip_filter_name(config: Config) -> str:
    return f"{config.envoy.name_prefix}{STRIP_FILTER}"
