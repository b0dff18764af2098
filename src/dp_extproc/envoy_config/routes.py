"""The route tables of the three listeners."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    Route,
    RouteAction,
    RouteActionRequestMirrorPolicy,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)

from dp_extproc.config import BodyMode, RetrySettings, Supervise
from dp_extproc.contract import DECODE_HOST, FAILED, PREFILL_HOST, PREFILL_RID, PREFIX_LENGTH, RETRY, WATCH
from dp_extproc.envoy_config.cluster_names import DECODE, DISPATCH, PREFILL, PREFILL_LEG
from dp_extproc.envoy_config.external_processing import FIRST_EVENT_FILTER, show_first_event

_NO_TIMEOUT: Final = timedelta(0)
"""Envoy's default of 15 s would cut long generations; how long one may take is the client's and the engine's matter."""


_FIRST_BACKOFF: Final = timedelta(milliseconds=25)
_LONGEST_BACKOFF: Final = timedelta(milliseconds=250)
"""The pair that failed is not asked again, so there is little to wait for; but a storm is spread a little."""


def to_dispatch(retry: RetrySettings) -> RouteConfiguration:
    """Route everything that comes in from outside; what the service wants placed anew comes by again.

    So does what the next hop dropped without an answer: the client has not seen a byte of one.
    """
    action = _forward(DISPATCH)
    if retry.attempts > 1:
        action.retry_policy = RetryPolicy(
            retry_on="retriable-headers,reset",
            num_retries=retry.attempts - 1,
            retriable_headers=[HeaderMatcher(name=RETRY, present_match=True)],
            retry_back_off=RetryPolicyRetryBackOff(base_interval=_FIRST_BACKOFF, max_interval=_LONGEST_BACKOFF),
        )
    return _table(Route(name="all", match=_when(), route=action, response_headers_to_remove=[RETRY, FAILED]))


def to_engines(supervision: Supervise, body_mode: BodyMode) -> RouteConfiguration:
    """Route by what the service decided; a request it did not place goes nowhere."""
    mirror = RouteActionRequestMirrorPolicy(cluster=PREFILL_LEG, disable_shadow_host_suffix_append=True)
    routes = [
        Route(name="disaggregated", match=_when(DECODE_HOST, PREFILL_HOST), route=_forward(DECODE, [mirror])),
        Route(name="one_server", match=_when(DECODE_HOST), route=_forward(DECODE)),
        Route(
            name="not_placed",
            match=_when(),
            direct_response=DirectResponseAction(status=503),
            response_headers_to_add=[HeaderValueOption(header=HeaderValue(key=RETRY, value="1"))],
        ),
    ]
    if supervision is Supervise.FIRST_EVENT:
        watched = Route(
            name="watched",
            match=_when(DECODE_HOST, PREFILL_HOST, WATCH),
            route=_forward(DECODE, [mirror]),
            typed_per_filter_config={FIRST_EVENT_FILTER: show_first_event(body_mode)},
        )
        routes.insert(0, watched)
    return _table(*routes)


def to_prefill() -> RouteConfiguration:
    """Route every mirrored request whose body was rewritten to the prefill server that the service named."""
    return _table(
        Route(
            name="not_rewritten",
            match=_when(PREFIX_LENGTH),
            direct_response=DirectResponseAction(status=500),
        ),
        Route(
            name="headers_not_rewritten",
            match=_when(PREFILL_RID),
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
