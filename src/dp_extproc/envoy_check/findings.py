"""What an audit finds, and the table of everything that it can find."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct


class Severity(StrEnum):
    """What a finding means for requests."""

    ERROR = "error"
    """Requests fail, or a promise of the printed configuration does not hold."""
    WARNING = "warning"
    """Requests are served. The operator may have had a reason."""


class Finding(Struct, frozen=True):
    """One thing that is missing or wrong in an Envoy."""

    code: str
    """Stable name, for documentation and tests."""
    place: str
    effect: str
    remedy: str
    severity: Severity


class _Text(Struct, frozen=True):
    severity: Severity
    effect: str
    remedy: str


_E: Final = Severity.ERROR
_W: Final = Severity.WARNING

_PRINTED: Final = "take it from `dp-extproc envoy-config`"

_TEXTS: Final[Mapping[str, _Text]] = {
    # The Envoy as a whole.
    "version_not_supported": _Text(
        _E, "Envoy {version} lacks header mutations by prefix, or refuses the block", "use Envoy {oldest} or later"
    ),
    "version_not_tested": _Text(
        _W, "Envoy {version} is later than any that the tests ran on", "watch the changelog; the tests ran on {tested}"
    ),
    "not_live": _Text(_W, "Envoy is in the state {state}, so its configuration may be incomplete", "repeat the check"),
    "short_drain": _Text(
        _W,
        "a change of a listener cuts the streams that are older than {seconds:g} s",
        "raise --drain-time-s (Envoy Gateway: shutdown.drainTimeout of the EnvoyProxy)",
    ),
    "update_rejected": _Text(
        _E,
        "Envoy rejected the last update and keeps the earlier state: {details}",
        "correct the resource at its control plane; " + _PRINTED,
    ),
    "foreign_update_rejected": _Text(
        _W,
        "Envoy rejected the last update of a resource outside the block: {details}",
        "correct it at its control plane",
    ),
    "not_read": _Text(_W, "this part was not checked: {reason}", "look at it by hand"),
    # The block.
    "extension_missing": _Text(
        _E,
        "Envoy refuses internal listeners, so the block does not exist",
        "add envoy.bootstrap.internal_listener to bootstrap_extensions of the bootstrap, and restart Envoy",
    ),
    "extension_twice": _Text(
        _E,
        "every request through an internal listener gets a 503, and no log has the reason",
        "keep envoy.bootstrap.internal_listener in bootstrap_extensions exactly once (Istio's proxy has it already)",
    ),
    "wasm_missing": _Text(
        _E,
        "Envoy was built without V8, so it refuses the listener that ends truncated streams with an event",
        "set envoy.truncated_streams: reset, or use another build of Envoy",
    ),
    "listener_missing": _Text(_E, "requests are not scheduled, or a leg has no way{hint}", _PRINTED),
    "cluster_missing": _Text(_E, "what leads there gets a 503{hint}", _PRINTED),
    "name_taken": _Text(
        _E,
        "something else has this name: {found}",
        "set envoy.name_prefix, and print the block with it",
    ),
    "name_twice": _Text(_E, "Envoy, or its control plane, drops one of the two", "remove one of them"),
    "not_active": _Text(
        _E,
        "the {kind} is {state}, so requests use the earlier one or none",
        "look for what it waits for: a secret, a route table or an endpoint set that never came",
    ),
    "field_differs": _Text(_E, "{what}; it is {found}, and the block has {printed}", _PRINTED),
    "setting_differs": _Text(
        _W, "{what}; it is {found}, and the block has {printed}", "keep it if it is on purpose; else " + _PRINTED
    ),
    "filter_order": _Text(_E, "filters run in another order than in the block: {found}", "restore: {printed}"),
    "circuit_breakers": _Text(
        _E,
        "above {limit} {what} at one time, requests get a 503",
        "set all four thresholds of circuit_breakers to 1000000 (Envoy Gateway writes 1,024)",
    ),
    "circuit_breakers_low": _Text(
        _W,
        "above {limit} {what} at one time, requests get a 503",
        "keep it if it is on purpose; the service limits requests by itself (admission)",
    ),
    "outlier_detection": _Text(
        _E,
        "Envoy ejects an address after errors; requests that were scheduled there get a 503",
        "remove outlier_detection; the service avoids failing endpoints by itself",
    ),
    "cluster_exposed": _Text(
        _E,
        "requests of clients reach a cluster that dials the address in a header, so a client can dial any address",
        "lead the route to the cluster {entrance}",
    ),
    # The way into the block.
    "no_entrance": _Text(
        _E,
        "no route leads to {entrance}, so no request is scheduled",
        "add the printed route: timeout, retry policy and header removals included",
    ),
    "retry_policy_missing": _Text(
        _E,
        "a failed attempt is not repeated: clients get the error of the first one",
        "add the retry_policy of the printed route",
    ),
    "retry_policy_ineffective": _Text(
        _E,
        "a failed attempt is not repeated, since nothing in retry_on ({found}) matches the header {header}",
        "add retriable-headers to retry_on, and {header} to retriable_headers",
    ),
    "retry_by_status": _Text(
        _W,
        "final refusals are repeated, too, since retry_on ({found}) matches by status",
        "prefer retriable-headers with {header}",
    ),
    "retry_without_reset": _Text(
        _W,
        "a request that the next hop dropped without a response is not repeated",
        "add reset to retry_on",
    ),
    "too_few_retries": _Text(
        _W, "at most {found} retries, while retry.attempts allows {wanted}", "set num_retries to {wanted}"
    ),
    "per_try_timeout": _Text(
        _E, "an attempt that takes longer than {seconds:g} s is repeated from its beginning", "remove {field}"
    ),
    "response_headers_kept": _Text(
        _E,
        "clients get {headers}, which name engine addresses",
        "add them to response_headers_to_remove of the route",
    ),
    "route_timeout": _Text(_E, "responses end after {seconds:g} s", "set timeout: 0s on the route"),
    "stream_idle_timeout": _Text(
        _E,
        "a stream without a byte for {seconds:g} s is cut; a long prompt takes longer",
        "set stream_idle_timeout: 0s on the connection manager, or idle_timeout: 0s on the route",
    ),
    "stream_duration": _Text(_E, "streams are cut after {seconds:g} s", "set max_stream_duration: 0s"),
    "client_headers_kept": _Text(
        _W,
        "filters and the router of this listener see {headers} of clients; the block removes them, but later",
        "remove them in early_header_mutation_extensions, or with the header mutation of the printed route",
    ),
    "buffer_limit": _Text(
        _E,
        "a request body above {found} bytes is not repeated after a failure (retry_or_shadow_abandoned)",
        "set per_connection_buffer_limit_bytes of the listener, or request_body_buffer_limit of the route, to {wanted}",
    ),
    "filter_limits_body": _Text(
        _E,
        "the filter {filter} holds whole bodies, so a body above {found} bytes gets a 413",
        "raise its limit to {wanted}",
    ),
    "answers_buffered": _Text(
        _E,
        "the filter {filter} holds responses until they are complete, so streams arrive at once",
        "set response_body_mode to NONE or STREAMED",
    ),
    "two_duplex_filters": _Text(
        _E,
        "two ext_proc filters in FULL_DUPLEX_STREAMED in one chain truncate bodies before Envoy 1.38",
        "use Envoy 1.38 or later, or another body mode for one of them",
    ),
    "compressed_streams": _Text(
        _W,
        "the filter {filter} collects events before it sends them, so tokens arrive in groups",
        "remove text/event-stream from its content_type",
    ),
    "no_request_timeouts": _Text(
        _W,
        "a client that stops in the middle of a request holds its buffers for ever",
        "set {fields} on the connection manager",
    ),
    "delayed_close": _Text(
        _W,
        "a truncated response ends {seconds:g} s late",
        "set delayed_close_timeout to 50 ms",
    ),
    # The endpoint-picker protocol.
    "picker_missing": _Text(
        _E,
        "no ext_proc filter calls the service, so requests go to engines unpicked",
        "reference the service in the InferencePool (endpointPickerRef), or add the filter",
    ),
    "picker_request_headers": _Text(_E, "the service gets no requests", "set request_header_mode to SEND"),
    "picker_request_body": _Text(
        _E,
        "request bodies are sent as {found}, so the service cannot read them",
        "set request_body_mode to FULL_DUPLEX_STREAMED or BUFFERED",
    ),
    "picker_response_headers": _Text(
        _E,
        "the service sees no end of a response, so every reservation stays until its limit",
        "set response_header_mode to SEND",
    ),
    "picker_response_bodies": _Text(
        _W,
        "each event of a stream passes the service, which costs a processor core for some thousand events per second",
        "set response_body_mode to NONE where the gateway lets you",
    ),
    "picker_fails_open": _Text(
        _W,
        "while no service responds, requests go to any engine unpicked",
        "set failure_mode_allow to false, unless every engine can serve every request",
    ),
    "picker_hold": _Text(
        _E,
        "response headers may wait for prefill for {hold:g} s, and the gateway gives up after {found:g} s",
        "raise message_timeout, or set picker.hold to less",
    ),
    "picker_message_timeout": _Text(
        _W,
        "Envoy waits {found:g} s for the service; a large body, or a place in the admission queue, may need more",
        "set message_timeout to {wanted:g} s",
    ),
}


CODES: Final = frozenset(_TEXTS)


def finding(code: str, place: str, **values: Any) -> Finding:
    """Make a finding of the table. *values* fill the blanks in its texts."""
    text = _TEXTS[code]
    return Finding(code, place, text.effect.format(**values), text.remedy.format(**values), text.severity)
