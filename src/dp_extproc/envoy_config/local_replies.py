"""Envoy's own error responses in the shapes of the service's errors, so that client libraries can read them.

A request that Envoy refuses before it has read a path gets the shape of OpenAI.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google.protobuf import Struct

from dp_extproc.contract import (
    FAILED,
    META_DECODE_HOST,
    META_PREFILL_HOST,
    META_REASON,
    METADATA_NAMESPACE,
    RETRY,
    write_cut,
)
from dp_extproc.envoy_config.yaml_text import commented, pack
from dp_extproc.request.error_shapes import ANTHROPIC_PART, ErrorShape, error_members
from dp_extproc.request.rejection import TRY_AGAIN

_Op = accesslog.ComparisonFilterOp
_IF_ABSENT: Final = core.HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT
_UPSTREAM_FAILED: Final = ["UF", "UC", "UR", "UH", "UO", "UT", "UPE", "LR"]
"""Response flags of a connection that failed, had no valid HTTP, or ended before the response headers."""

_HOSTS: Final = [f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{key})%" for key in (META_PREFILL_HOST, META_DECODE_HOST)]
_NULL: Final = f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:null)%"
"""A value that is never there, for which Envoy writes ``null``. Patches of objects in Kubernetes lose a literal one."""
_NO_HEADERS: Final[Mapping[str, str]] = {}
_REPEAT: Final = {RETRY: "1", FAILED: ",".join((*_HOSTS, write_cut("%RESPONSE_FLAGS%")))}
"""Headers with which the front door repeats a request without a decision of the service about the retry.

The service also reads from them whether the engine had accepted the request, in body modes that show it no text.
"""
_RETRY_AFTER: Final = dict(TRY_AGAIN)

_LOST: Final = "The server did not answer: %RESPONSE_CODE_DETAILS%. Try again."
_LOST_WHILE_HELD: Final = "The server was lost before its answer had begun: %RESPONSE_CODE_DETAILS%. Try again."
_UNAVAILABLE: Final = "The routing service did not place the request; it may be starting or down. Try again."
_FAILED: Final = "The proxy failed: %RESPONSE_CODE_DETAILS%"
_TOO_SLOW: Final = "The request did not arrive in time (%RESPONSE_CODE_DETAILS%); send it again, without a pause."
_TOO_MANY: Final = "The proxy gets too many requests. Try again later."
_OLD_HTTP: Final = "The proxy does not accept this version of HTTP; use HTTP/1.1 or HTTP/2."
_LARGE_HEADERS: Final = "The headers of the request are too large or too many; send fewer or shorter ones."
_REFUSED: Final = "The proxy refused the request: %RESPONSE_CODE_DETAILS%"


def build_local_replies(
    max_body_bytes: int, *, is_front_door: bool = False, retries: bool = False
) -> hcm.LocalReplyConfig:
    """Build the table of Envoy's own responses.

    For Envoy a refusal of the service (an ``ImmediateResponse``) is a local reply, too. It passes unchanged, since the
    service sets its reason as dynamic metadata in the same message.

    Args:
        max_body_bytes: Limit that the error for a larger body names.
        is_front_door: Whether clients connect here, whose requests may be slow, old or malformed.
        retries: Whether the front door repeats a request that was lost before its response headers were committed. The
            service removes the retry headers if it decides otherwise. It cannot do so if its process is gone, or if
            the response headers were still held, since Envoy calls no filter then. In the second case the service
            counts the loss when the request arrives again.
    """
    repeat = _REPEAT if retries else {}
    too_large = f"The request body is larger than {max_body_bytes} bytes; send a smaller one."
    return commented(
        hcm.LocalReplyConfig(
            mappers=[
                hcm.ResponseMapper(filter=_refusal_of_the_service()),
                *(_errors(_lost_while_held(), 503, "upstream_failed", _LOST_WHILE_HELD, repeat) if retries else ()),
                *_errors(_status(_Op.EQ, 413), 413, "request_too_large", too_large),
                *_errors(_lost(), 503, "upstream_failed", _LOST, {**_RETRY_AFTER, **repeat}),
                *_errors(_status(_Op.EQ, 503), 503, "service_unavailable", _UNAVAILABLE, _RETRY_AFTER),
                *_errors(_status(_Op.GE, 500), 500, "proxy_error", _FAILED),
                *_errors(_status(_Op.EQ, 429), 429, "too_many_requests", _TOO_MANY, _RETRY_AFTER),
                *(_errors_of_clients() if is_front_door else ()),
                *_errors(_status(_Op.GE, 400), 400, "request_refused", _REFUSED),
            ]
        ),
        "Envoy's own errors in the shapes of OpenAI, SGLang and Anthropic.",
    )


def _errors_of_clients() -> Iterator[hcm.ResponseMapper]:
    yield from _errors(_status(_Op.EQ, 408), 408, "request_timeout", _TOO_SLOW)
    yield from _errors(_status(_Op.EQ, 426), 426, "http_version_not_supported", _OLD_HTTP)
    yield from _errors(_status(_Op.EQ, 431), 431, "request_headers_too_large", _LARGE_HEADERS)


def _lost() -> accesslog.AccessLogFilter:
    failed = accesslog.AccessLogFilter(response_flag_filter=accesslog.ResponseFlagFilter(flags=_UPSTREAM_FAILED))
    return _all_of(_status(_Op.GE, 500), failed)


def _lost_while_held() -> accesslog.AccessLogFilter:
    lost = ExpressionFilter(expression='response.code_details.startsWith("upstream_reset_after_response_started")')
    extension = accesslog.ExtensionFilter(name="envoy.access_loggers.extension_filters.cel", typed_config=pack(lost))
    return accesslog.AccessLogFilter(extension_filter=extension)


def _refusal_of_the_service() -> accesslog.AccessLogFilter:
    reason = matcher.MetadataMatcher(
        filter=METADATA_NAMESPACE,
        path=[matcher.MetadataMatcherPathSegment(key=META_REASON)],
        value=matcher.ValueMatcher(present_match=True),
    )
    known = commented(
        accesslog.MetadataFilter(matcher=reason, match_if_key_not_found=False),
        "Refusals of the service have a reason in their metadata and pass unchanged.",
    )
    return accesslog.AccessLogFilter(metadata_filter=known)


def _status(op: _Op, status: int) -> accesslog.AccessLogFilter:
    # Envoy's schema demands a runtime key. Nothing sets this one.
    value = core.RuntimeUInt32(default_value=status, runtime_key="dp_extproc.unused")
    comparison = accesslog.ComparisonFilter(op=op, value=value)
    return accesslog.AccessLogFilter(status_code_filter=accesslog.StatusCodeFilter(comparison=comparison))


def _all_of(*filters: accesslog.AccessLogFilter) -> accesslog.AccessLogFilter:
    return accesslog.AccessLogFilter(and_filter=accesslog.AndFilter(filters=list(filters)))


def _errors(
    when: accesslog.AccessLogFilter, status: int, code: str, message: str, headers: Mapping[str, str] = _NO_HEADERS
) -> Iterator[hcm.ResponseMapper]:
    """Build an error in each shape; the status is one of those that it is for, and decides about the types."""
    path = route.HeaderMatcher(name=":path", string_match=matcher.StringMatcher(contains=ANTHROPIC_PART))
    messages = accesslog.AccessLogFilter(header_filter=accesslog.HeaderFilter(header=path))
    for shape, shaped in ((ErrorShape.ANTHROPIC, _all_of(messages, when)), (ErrorShape.OPENAI, when)):
        members = error_members(shape, status, message, code, _NULL)
        if shape is ErrorShape.OPENAI:
            members["code"] = "%RESPONSE_CODE%"
        yield hcm.ResponseMapper(
            filter=shaped,
            headers_to_add=[
                core.HeaderValueOption(header=core.HeaderValue(key=name, value=value), append_action=_IF_ABSENT)
                for name, value in headers.items()
            ],
            body_format_override=core.SubstitutionFormatString(json_format=Struct.from_dict(members)),
        )
