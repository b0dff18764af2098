"""Rules for every route that leads to engines: how long a response may take, and a request."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.ways import Way

_DEFAULT_TIMEOUT: Final = 15.0
"""Envoy's timeout of a route in seconds."""
_DEFAULT_IDLE: Final = 300.0
"""Envoy's ``stream_idle_timeout`` in seconds."""
_DEFAULT_CLOSE: Final = 1.0
"""Envoy's ``delayed_close_timeout`` in seconds."""
_LONG_CLOSE: Final = 0.25
"""Delay in seconds that a client notices at the end of a truncated response."""


def timing(way: Way) -> Iterator[Finding]:
    """Look at all timeouts of a route and its connection manager."""
    action, manager, place = way.route.route, way.manager, way.place
    if action is None:
        return
    if timeout := _seconds(action.timeout, _DEFAULT_TIMEOUT):
        yield finding("route_timeout", place, seconds=timeout)
    idle = _seconds(manager.stream_idle_timeout, _DEFAULT_IDLE)
    if idle := _seconds(action.idle_timeout, idle):
        yield finding("stream_idle_timeout", place, seconds=idle)
    common = manager.common_http_protocol_options
    duration = _seconds(common.max_stream_duration if common else None, 0.0)
    if action.max_stream_duration is not None:
        duration = _seconds(action.max_stream_duration.max_stream_duration, duration)
    if duration:
        yield finding("stream_duration", place, seconds=duration)
    unset = [name for name in ("request_headers_timeout", "request_timeout") if not getattr(manager, name)]
    if unset:
        yield finding("no_request_timeouts", place, fields=" and ".join(unset))
    if (close := _seconds(manager.delayed_close_timeout, _DEFAULT_CLOSE)) > _LONG_CLOSE:
        yield finding("delayed_close", place, seconds=close)


def _seconds(given: timedelta | None, default: float) -> float:
    return default if given is None else given.total_seconds()
