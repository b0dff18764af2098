"""Removal of headers: the clients' at the front door, the router's own on the last yard to an engine."""

from collections.abc import Sequence
from typing import Final

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption, TypedExtensionConfig
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as HeaderMutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import Mutations
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from dp_extproc.extproc.names import FOREIGN_NAMES, FOREIGN_PREFIXES, OWNED_PREFIX, SESSION

_TOWARDS_ENGINES: Final = (OWNED_PREFIX, "x-envoy-")
"""Ours, and what Envoy adds on its own, such as ``x-envoy-internal``."""


def strip_client_headers(session_header: str | None) -> TypedExtensionConfig:
    """Remove what only the router may set, before any filter or route sees the request.

    Args:
        session_header: Header of clients that the service is to see, under a name of ours.
    """
    mutations = [*_remove(FOREIGN_PREFIXES), *(HeaderMutation(remove=name) for name in FOREIGN_NAMES)]
    if session_header is not None:
        copy = HeaderValue(key=SESSION, value=f"%REQ({session_header})%")
        mutations.append(HeaderMutation(append=HeaderValueOption(header=copy)))  # nothing is added for an absent one
    return TypedExtensionConfig(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=Any.pack(EarlyHeaderMutation(mutations=mutations)),
    )


def strip_router_headers() -> HttpFilter:
    """Build the filter by which a request leaves for an engine, of the cluster's own chain.

    A route's ``request_headers_to_remove`` would act before the host is chosen, and the host is chosen by header.
    """
    mutations = Mutations(request_mutations=_remove(_TOWARDS_ENGINES))
    return HttpFilter(
        name="envoy.filters.http.header_mutation", typed_config=Any.pack(HeaderMutationFilter(mutations=mutations))
    )


def last_upstream_filter() -> HttpFilter:
    """Build the filter that has to be the last one of a cluster's chain."""
    return HttpFilter(name="envoy.filters.http.upstream_codec", typed_config=Any.pack(UpstreamCodec()))


def _remove(prefixes: Sequence[str]) -> list[HeaderMutation]:
    return [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in prefixes
    ]
