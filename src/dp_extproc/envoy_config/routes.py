"""The route tables of the front door and of the listeners that schedule requests and forward prefill legs."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher

from dp_extproc.config import BodyMode, Config, RetrySettings, Supervise
from dp_extproc.contract import DECODE_HOST, FAILED, PREFILL_HOST, PREFILL_RID, PREFIX_LENGTH, RETRY, WATCH, WATCH_ALL
from dp_extproc.envoy_config.filters import FIRST_EVENT_FILTER, enable_first_event_report, enable_response_report
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.yaml_text import commented

_NO_TIMEOUT: Final = timedelta(0)
"""No limit. Envoy's default of 15 s would cut long generations; client and engine have limits of their own."""

_WHY_NO_TIMEOUT: Final = "Envoy's default of 15 s would end long generations."

_FIRST_BACKOFF: Final = timedelta(milliseconds=25)
_LONGEST_BACKOFF: Final = timedelta(milliseconds=250)
"""Pauses before a retry. They are short, as a retry avoids the failed endpoints; they spread many retries a little."""


def to_dispatch(names: Names, retry: RetrySettings) -> route.Route:
    """Build the route of a front door. It forwards every request to the listener where it is scheduled.

    It repeats a request if the response has the retry header, or if the next hop dropped it without a response.
    """
    action = commented(
        _forward(names.dispatch),
        timeout=_WHY_NO_TIMEOUT,
        idle_timeout="No limits of the connection manager either, which may be that of another gateway.",
    )
    action.idle_timeout = _NO_TIMEOUT
    action.max_stream_duration = route.RouteActionMaxStreamDuration(max_stream_duration=_NO_TIMEOUT)
    if retry.attempts > 1:
        backoff = route.RetryPolicyRetryBackOff(base_interval=_FIRST_BACKOFF, max_interval=_LONGEST_BACKOFF)
        action.retry_policy = commented(
            route.RetryPolicy(
                retry_on="retriable-headers,reset",
                num_retries=retry.attempts - 1,
                retriable_headers=[route.HeaderMatcher(name=RETRY, present_match=True)],
                retry_back_off=backoff,
            ),
            "The service requests a retry by a header and limits the attempts (retry). The front door sends the\n"
            "failed endpoints along, so that the next attempt avoids them.",
        )
    return route.Route(name="all", match=_when(), route=action, response_headers_to_remove=[RETRY, FAILED])


def to_engines(config: Config) -> route.RouteConfiguration:
    """Build the routes to engines, by the headers of the decision. A request without a decision gets a 503."""
    names, body_mode = Names.of(config), config.envoy.body_mode
    mirrors: list[route.RouteActionRequestMirrorPolicy] = []
    disaggregated: tuple[str, ...] = (DECODE_HOST,)
    routes = [
        commented(
            route.Route(name="one_server", match=_when(DECODE_HOST), route=_forward(names.decode)),
            "The service sends the other leg of a request to a disaggregated pool itself."
            if config.sends_legs
            else "Scheduled on one endpoint: an aggregated pool, or a request that any engine can serve.",
        ),
        commented(
            route.Route(
                name="not_placed",
                match=_when(),
                direct_response=route.DirectResponseAction(status=503),
                response_headers_to_add=[core.HeaderValueOption(header=core.HeaderValue(key=RETRY, value="1"))],
            ),
            "Fail closed: a request without a decision reaches no engine.",
        ),
    ]
    if not config.sends_legs:
        disaggregated = (DECODE_HOST, PREFILL_HOST)
        mirror = route.RouteActionRequestMirrorPolicy(cluster=names.prefill_leg, disable_shadow_host_suffix_append=True)
        comment = "Otherwise the engine would get the host name with -shadow appended."
        mirrors = [commented(mirror, disable_shadow_host_suffix_append=comment)]
        mirrored = route.Route(name="disaggregated", match=_when(*disaggregated), route=_forward(names.decode, mirrors))
        comment = "Scheduled on two endpoints: decode responds to the client, and a copy goes to prefill."
        routes.insert(0, commented(mirrored, comment))
    if config.supervision.mode is Supervise.FIRST_EVENT:
        watched = commented(
            route.Route(
                name="watched",
                match=_when(*disaggregated, WATCH),
                route=_forward(names.decode, mirrors),
                typed_per_filter_config={FIRST_EVENT_FILTER: enable_first_event_report(body_mode)},
            ),
            "A stream: the service gets its first event before the client gets anything.",
        )
        routes.insert(0, watched)
        if body_mode is not BodyMode.NONE:
            changed = commented(
                route.Route(
                    name="changed",
                    match=_when(*disaggregated, **{WATCH: WATCH_ALL}),
                    route=_forward(names.decode, mirrors),
                    typed_per_filter_config={FIRST_EVENT_FILTER: enable_response_report()},
                ),
                "The client has given request ids, which the service puts into the response.",
            )
            routes.insert(0, changed)
    return table(*routes)


def to_prefill(names: Names) -> route.RouteConfiguration:
    """Build the routes of the prefill leg: to the prefill endpoint, if body or headers were rewritten."""
    failed = route.DirectResponseAction(status=500)
    return table(
        commented(
            route.Route(name="not_rewritten", match=_when(PREFIX_LENGTH), direct_response=failed),
            "The script removes this header last, so a request that has it was not rewritten.",
        ),
        route.Route(name="headers_not_rewritten", match=_when(PREFILL_RID), direct_response=failed),
        route.Route(name="rewritten", match=_when(), route=_forward(names.prefill)),
    )


def table(*routes: route.Route) -> route.RouteConfiguration:
    return route.RouteConfiguration(virtual_hosts=[route.VirtualHost(name="all", domains=["*"], routes=list(routes))])


def _when(*headers: str, **values: str) -> route.RouteMatch:
    present = [route.HeaderMatcher(name=name, present_match=True) for name in headers]
    equal = [route.HeaderMatcher(name=name, string_match=StringMatcher(exact=text)) for name, text in values.items()]
    return route.RouteMatch(prefix="/", headers=[*present, *equal])


def _forward(cluster: str, mirrors: Sequence[route.RouteActionRequestMirrorPolicy] = ()) -> route.RouteAction:
    return commented(
        route.RouteAction(cluster=cluster, timeout=_NO_TIMEOUT, request_mirror_policies=list(mirrors)),
        timeout=_WHY_NO_TIMEOUT,
    )
