"""Rules for gateways that speak the endpoint-picker protocol: their ext_proc filter, and the routes that have it."""

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from msgspec import Struct

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check.block import low_breakers
from dp_extproc.envoy_check.bodies import bodies
from dp_extproc.envoy_check.facts import Facts, destinations
from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.processors import cluster_of, on_route
from dp_extproc.envoy_check.timing import timing
from dp_extproc.envoy_check.ways import HttpStep, Way, ways_with

_DEFAULT_TIMEOUT: Final = timedelta(milliseconds=200)
"""Envoy's ``message_timeout``."""
_NEEDED_TIMEOUT: Final = 20.0
"""Seconds for one message. A large body needs more than Envoy's default on a busy machine."""


class PickerStep(Struct, frozen=True):
    """The filter that calls the service, on one route."""

    way: Way
    step: HttpStep
    settings: ExternalProcessor

    @property
    def place(self) -> str:
        return f"{self.way.place}, filter {self.step.name}"

    @property
    def mode(self) -> ProcessingMode:
        return self.settings.processing_mode or ProcessingMode()


def picker(facts: Facts) -> Iterator[Finding]:
    """Look at every route whose filters call the service."""
    steps = _steps(facts)
    if not steps:
        yield finding("picker_missing", "routes")
    for each in steps:
        for rule in _RULES:
            yield from rule(each, facts.config)
        yield from timing(each.way)
        yield from bodies(each.way, facts.config.envoy.max_body_bytes, facts.snapshot.version)
    called = [cluster_of(each.settings) for each in steps]
    for name in dict.fromkeys([*called, *(name for each in steps for name in sorted(each.way.clusters))]):
        if (found := facts.cluster(name)) is not None:
            yield from low_breakers(f"cluster {name}", found)


def _steps(facts: Facts) -> list[PickerStep]:
    """Find the filters that call the service: by its port, or all if none has that port."""
    found = [
        PickerStep(way, step, settings)
        for way in ways_with(facts.snapshot, ExternalProcessor, facts.skip)
        for step in way.steps
        if (settings := on_route(step)) is not None
    ]
    port = facts.config.listen.grpc.port
    ours = [each for each in found if _has_port(facts, cluster_of(each.settings), port)]
    return ours or found


def _has_port(facts: Facts, cluster: str, port: int) -> bool:
    if f"|{port}|" in cluster or cluster.endswith(f":{port}"):  # as Istio names a cluster; an address
        return True
    resource = facts.clusters.get(cluster)
    return resource is not None and any(_mentions_port(each, port) for each in destinations(resource, facts.endpoints))


def _mentions_port(data: Any, port: int) -> bool:
    if isinstance(data, Mapping):
        return any(
            (key in {"port_value", "portValue"} and value == port) or _mentions_port(value, port)
            for key, value in data.items()
        )
    return isinstance(data, list) and any(_mentions_port(each, port) for each in data)


def _request_headers(each: PickerStep, _config: Config) -> Iterator[Finding]:
    if each.mode.request_header_mode is ProcessingModeHeaderSendMode.SKIP:
        yield finding("picker_request_headers", each.place)


def _request_body(each: PickerStep, config: Config) -> Iterator[Finding]:
    mode, modes = each.mode.request_body_mode, ProcessingModeBodySendMode
    if mode in {modes.BUFFERED, modes.FULL_DUPLEX_STREAMED}:
        return
    if mode is not modes.NONE or config.envoy.body_mode is not BodyMode.NONE:
        yield finding("picker_request_body", each.place, found=mode.name)


def _response_headers(each: PickerStep, _config: Config) -> Iterator[Finding]:
    if each.mode.response_header_mode is ProcessingModeHeaderSendMode.SKIP:
        yield finding("picker_response_headers", each.place)


def _response_body(each: PickerStep, _config: Config) -> Iterator[Finding]:
    modes = ProcessingModeBodySendMode
    if each.mode.response_body_mode in {modes.STREAMED, modes.FULL_DUPLEX_STREAMED}:
        yield finding("picker_response_bodies", each.place)


def _failure_mode(each: PickerStep, _config: Config) -> Iterator[Finding]:
    if each.settings.failure_mode_allow:
        yield finding("picker_fails_open", each.place)


def _message_timeout(each: PickerStep, _config: Config) -> Iterator[Finding]:
    """Compare the time for one message with what the service needs. Envoy has no such limit in full-duplex mode."""
    if each.mode.request_body_mode is ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED:
        return
    limit = (each.settings.message_timeout or _DEFAULT_TIMEOUT).total_seconds()
    if limit < _NEEDED_TIMEOUT:
        yield finding("picker_message_timeout", each.place, found=limit, wanted=_NEEDED_TIMEOUT)


def _hold(each: PickerStep, config: Config) -> Iterator[Finding]:
    """Compare the time for which response headers may be held. In full duplex no timer of the gateway runs then."""
    is_timed = each.mode.response_body_mode is not ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED
    has_legs = config.sends_legs and any(pool.is_disaggregated for pool in config.pools)
    limit = (each.settings.message_timeout or _DEFAULT_TIMEOUT).total_seconds()
    if is_timed and has_legs and config.picker.hold >= limit:
        yield finding("picker_hold", each.place, hold=config.picker.hold, found=limit)


_RULES: Final[tuple[Callable[[PickerStep, Config], Iterator[Finding]], ...]] = (
    _request_headers,
    _request_body,
    _response_headers,
    _response_body,
    _failure_mode,
    _message_timeout,
    _hold,
)
"""What the filter that calls the service has to fulfil."""
