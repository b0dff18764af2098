"""Rules for every route that leads to engines: what its listener and filters do with bodies."""

from collections.abc import Iterator
from typing import Final

from envoy_data_plane.envoy.extensions.filters.http.buffer.v3 import Buffer, BufferPerRoute
from envoy_data_plane.envoy.extensions.filters.http.compressor.v3 import Compressor
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import ExtAuthz
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ExternalProcessor, ProcessingModeBodySendMode

from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.processors import on_route
from dp_extproc.envoy_check.ways import HttpStep, Way

_DEFAULT_LIMIT: Final = 1 << 20
"""Envoy's buffer of a connection in bytes."""
_EVENTS: Final = "text/event-stream"
_HOLDS: Final = (ProcessingModeBodySendMode.BUFFERED, ProcessingModeBodySendMode.BUFFERED_PARTIAL)
_NO_TRUNCATION: Final = (1, 38)
"""First version in which two filters in full-duplex mode leave bodies whole (envoyproxy/envoy#43983)."""


def body_limit(way: Way) -> int:
    """Return the longest request body in bytes that Envoy keeps for retries, and that filters can hold."""
    of_listener = way.listener.per_connection_buffer_limit_bytes
    listener = _DEFAULT_LIMIT if of_listener is None else of_listener
    for part in (way.route, way.host):
        if part.request_body_buffer_limit is not None:
            return part.request_body_buffer_limit
    for part in (way.route, way.host):
        if part.per_request_buffer_limit_bytes is not None:
            return min(listener, part.per_request_buffer_limit_bytes)
    return listener


def bodies(way: Way, largest_body: int, version: tuple[int, int, int] | None) -> Iterator[Finding]:
    """Look at the filters of a way that hold bodies.

    Args:
        way: The way.
        largest_body: Of a request, in bytes.
        version: Envoy's version, if it is known.
    """
    duplex = 0
    for step in way.steps:
        yield from _limits(way, step, largest_body)
        processor = on_route(step)
        mode = processor.processing_mode if processor is not None else None
        if mode is not None:
            duplex += mode.request_body_mode is ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED
            if mode.response_body_mode in _HOLDS:
                yield finding("answers_buffered", way.place, filter=step.name)
        if isinstance(step.settings, Compressor) and _EVENTS in _compressed(step.settings):
            yield finding("compressed_streams", way.place, filter=step.name)
    if duplex > 1 and version is not None and version[:2] < _NO_TRUNCATION:
        yield finding("two_duplex_filters", way.place)


def _limits(way: Way, step: HttpStep, largest: int) -> Iterator[Finding]:
    settings, limit = step.settings, None
    if isinstance(settings, Buffer):
        override = step.on_route.buffer if isinstance(step.on_route, BufferPerRoute) else None
        limit = (override or settings).max_request_bytes
    elif isinstance(settings, ExtAuthz) and settings.with_request_body is not None:
        if not settings.with_request_body.allow_partial_message:
            limit = settings.with_request_body.max_request_bytes
    elif isinstance(settings, ExternalProcessor):
        processor = on_route(step)
        mode = processor.processing_mode if processor is not None else None
        if mode is not None and mode.request_body_mode is ProcessingModeBodySendMode.BUFFERED:
            limit = body_limit(way)
    if limit is not None and limit < largest:
        yield finding("filter_limits_body", way.place, filter=step.name, found=limit, wanted=largest)


def _compressed(compressor: Compressor) -> list[str]:
    direction = compressor.response_direction_config
    common = direction.common_config if direction is not None else None
    return list(common.content_type if common is not None else compressor.content_type)
