"""Envoy's own error responses in the shape of OpenAI errors, so that client libraries can read them."""

from collections.abc import Mapping
from typing import Final

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLogFilter,
    AndFilter,
    ComparisonFilter,
    ComparisonFilterOp,
    ExtensionFilter,
    MetadataFilter,
    ResponseFlagFilter,
    StatusCodeFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    RuntimeUInt32,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.type.matcher.v3 import MetadataMatcher, MetadataMatcherPathSegment, ValueMatcher
from envoy_data_plane.google.protobuf import Struct

from dp_extproc.contract import CUT, FAILED, META_DECODE_HOST, META_PREFILL_HOST, META_REASON, METADATA_NAMESPACE, RETRY
from dp_extproc.envoy_config.yaml_text import commented, pack

_UPSTREAM_FAILED: Final = ["UF", "UC", "UR", "UH", "UO", "UT", "UPE", "LR"]
"""Response flags of a connection that failed, had no valid HTTP, or ended before the response headers."""

_HOSTS: Final = [f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{key})%" for key in (META_PREFILL_HOST, META_DECODE_HOST)]
_REPEAT: Final = {RETRY: "1", FAILED: ",".join((*_HOSTS, CUT))}
"""Headers with which the front door repeats a request without a decision of the service about the retry."""


def build_local_replies(max_body_bytes: int, *, retries: bool = False) -> LocalReplyConfig:
    """Build the table of Envoy's own responses.

    An ``ImmediateResponse`` of the service is a local reply, too. It has a reason, which the service sets as dynamic
    metadata in the same message, and therefore passes as it is.

    Args:
        max_body_bytes: Limit that the error for a larger body names.
        retries: Whether the front door repeats what was lost before its response headers were committed. The service
            removes the retry headers if it decides otherwise. It cannot do so if its process is gone, or if the
            headers were still held here, since Envoy calls no filter then. In the second case the service counts the
            loss when the request arrives again.
    """
    lost = AndFilter(
        filters=[
            _status(ComparisonFilterOp.GE, 500),
            AccessLogFilter(response_flag_filter=ResponseFlagFilter(flags=_UPSTREAM_FAILED)),
        ]
    )
    mappers = [
        ResponseMapper(filter=_refusal_of_the_service()),
        *([_lost_while_held()] if retries else []),
        _reply(
            _status(ComparisonFilterOp.EQ, 413),
            f"The request body is larger than {max_body_bytes} bytes.",
            "invalid_request_error",
            "request_too_large",
        ),
        _reply(
            AccessLogFilter(and_filter=lost),
            "The request got no answer: %LOCAL_REPLY_BODY%",
            "server_error",
            "upstream_failed",
            _REPEAT if retries else {},
        ),
        _reply(
            _status(ComparisonFilterOp.EQ, 503),
            "The routing service did not place the request; it may be starting or down. Try again.",
            "server_error",
            "service_unavailable",
        ),
        _reply(
            _status(ComparisonFilterOp.GE, 500),
            "The proxy failed: %RESPONSE_CODE_DETAILS%",
            "server_error",
            "proxy_error",
        ),
        _reply(
            _status(ComparisonFilterOp.GE, 400),
            "The proxy refused the request: %RESPONSE_CODE_DETAILS%",
            "invalid_request_error",
            "request_refused",
        ),
    ]
    return commented(LocalReplyConfig(mappers=mappers), "Envoy's own errors in the shape of OpenAI errors.")


def _lost_while_held() -> ResponseMapper:
    lost = ExpressionFilter(expression='response.code_details.startsWith("upstream_reset_after_response_started")')
    extension = ExtensionFilter(name="envoy.access_loggers.extension_filters.cel", typed_config=pack(lost))
    return _reply(
        AccessLogFilter(extension_filter=extension),
        "The server was lost before its answer had begun: %RESPONSE_CODE_DETAILS%",
        "server_error",
        "upstream_failed",
        _REPEAT,
    )


def _refusal_of_the_service() -> AccessLogFilter:
    matcher = MetadataMatcher(
        filter=METADATA_NAMESPACE,
        path=[MetadataMatcherPathSegment(key=META_REASON)],
        value=ValueMatcher(present_match=True),
    )
    known = commented(
        MetadataFilter(matcher=matcher, match_if_key_not_found=False),
        "Refusals of the service have a reason in their metadata and pass unchanged.",
    )
    return AccessLogFilter(metadata_filter=known)


def _status(op: ComparisonFilterOp, status: int) -> AccessLogFilter:
    # Envoy's schema demands a runtime key. Nothing sets this one.
    value = RuntimeUInt32(default_value=status, runtime_key="dp_extproc.unused")
    return AccessLogFilter(status_code_filter=StatusCodeFilter(comparison=ComparisonFilter(op=op, value=value)))


def _reply(
    when: AccessLogFilter, message: str, kind: str, code: str, headers: Mapping[str, str] | None = None
) -> ResponseMapper:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return ResponseMapper(
        filter=when,
        headers_to_add=[
            HeaderValueOption(header=HeaderValue(key=name, value=value)) for name, value in (headers or {}).items()
        ],
        body_format_override=SubstitutionFormatString(json_format=Struct.from_dict({"error": error})),
    )
