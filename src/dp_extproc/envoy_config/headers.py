"""Removal of headers: clients' at the front door, the router's own before an engine, an engine's behind it."""

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

from dp_extproc.contract import (
    FOREIGN_NAMES,
    FOREIGN_PREFIXES,
    OVERRIDE_PREFIX,
    OWNED_PREFIX,
    SESSION,
    SET_INSIDE,
)

_ENVOYS: Final = "x-envoy-"
_INSIDE: Final = (OWNED_PREFIX, _ENVOYS)
"""Ours, and Envoy's own. Both steer: on a request such as ``x-envoy-internal``, on an answer such as ``x-dp-retry``,
``x-envoy-ratelimited`` or ``x-envoy-immediate-health-check-fail``."""


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
    """Build the filter between Envoy and an engine, of the cluster's own chain: no steering header passes either way.

    A route's ``request_headers_to_remove`` would act before the host is chosen, and the host is chosen by header. A
    route's ``response_headers_to_remove`` would act after the router has read an answer, and after local replies have
    got headers of ours.
    """
    return _mutate(Mutations(request_mutations=_remove(_INSIDE), response_mutations=_remove(_INSIDE)))


def strip_headers_before_placement() -> HttpFilter:
    """Build the filter on the way to the place where requests are placed.

    It removes once more what :func:`strip_client_headers` does: the front door may be another one, which does not. The
    name of the conversation stays; it is the client's own word anyway.
    """
    names = [HeaderMutation(remove=name) for name in (*FOREIGN_NAMES, *SET_INSIDE)]
    return _mutate(Mutations(request_mutations=[*_remove((OVERRIDE_PREFIX, _ENVOYS)), *names]))


def last_upstream_filter() -> HttpFilter:
    """Build the filter that has to be the last one of a cluster's chain."""
    return HttpFilter(name="envoy.filters.http.upstream_codec", typed_config=Any.pack(UpstreamCodec()))


def _mutate(mutations: Mutations) -> HttpFilter:
    return HttpFilter(
        name="envoy.filters.http.header_mutation", typed_config=Any.pack(HeaderMutationFilter(mutations=mutations))
    )


def _remove(prefixes: Sequence[str]) -> list[HeaderMutation]:
    return [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in prefixes
    ]
