"""The route tables of the three listeners."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    Route,
    RouteAction,
    RouteActionRequestMirrorPolicy,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)

from dp_extproc.envoy_config.clusters import DECODE, DISPATCH, PREFILL, PREFILL_LEG
from dp_extproc.extproc.names import DECODE_HOST, PREFILL_HOST, PREFIX_LENGTH

_NO_TIMEOUT: Final = timedelta(0)
"""Envoy's default of 15 s would cut long generations; how long one may take is the client's and the engine's matter."""


def to_dispatch() -> RouteConfiguration:
    """Route everything that comes in from outside."""
    return _table(Route(name="all", match=_when(), route=_forward(DISPATCH)))


def to_engines() -> RouteConfiguration:
    """Route by what the service decided; a request it did not place goes nowhere."""
    mirror = RouteActionRequestMirrorPolicy(cluster=PREFILL_LEG, disable_shadow_host_suffix_append=True)
    return _table(
        Route(name="disaggregated", match=_when(DECODE_HOST, PREFILL_HOST), route=_forward(DECODE, [mirror])),
        Route(name="one_server", match=_when(DECODE_HOST), route=_forward(DECODE)),
        Route(name="not_placed", match=_when(), direct_response=DirectResponseAction(status=503)),
    )


def to_prefill() -> RouteConfiguration:
    """Route every mirrored request whose body was rewritten to the prefill server that the service named."""
    return _table(
        Route(
            name="not_rewritten",
            match=_when(PREFIX_LENGTH),
            direct_response=DirectResponseAction(status=500),
        ),
        Route(name="rewritten", match=_when(), route=_forward(PREFILL)),
    )


def _table(*routes: Route) -> RouteConfiguration:
    return RouteConfiguration(virtual_hosts=[VirtualHost(name="all", domains=["*"], routes=list(routes))])


def _when(*headers: str) -> RouteMatch:
    return RouteMatch(prefix="/", headers=[HeaderMatcher(name=name, present_match=True) for name in headers])


def _forward(cluster: str, mirrors: Sequence[RouteActionRequestMirrorPolicy] = ()) -> RouteAction:
    return RouteAction(cluster=cluster, timeout=_NO_TIMEOUT, request_mirror_policies=list(mirrors))
