"""Envoy's own error responses in the shape of OpenAI errors, so that client libraries can read them."""

from collections.abc import Mapping
from typing import Final

from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google.protobuf import Struct

from dp_extproc.contract import CUT, FAILED, META_DECODE_HOST, META_PREFILL_HOST, META_REASON, METADATA_NAMESPACE, RETRY
from dp_extproc.envoy_config.yaml_text import commented, pack

_Op = accesslog.ComparisonFilterOp
_REQUEST_ERROR: Final = "invalid_request_error"
_FLEET_ERROR: Final = "server_error"
"""OpenAI's types of errors: of the request itself, and of all that is behind the front door."""

_UPSTREAM_FAILED: Final = ["UF", "UC", "UR", "UH", "UO", "UT", "UPE", "LR"]
"""Response flags of a connection that failed, had no valid HTTP, or ended before the response headers."""

_HOSTS: Final = [f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{key})%" for key in (META_PREFILL_HOST, META_DECODE_HOST)]
_NULL: Final = f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:null)%"
"""A value that is never there, for which Envoy writes ``null``. Patches of objects in Kubernetes lose a literal one."""
_NO_HEADERS: Final[Mapping[str, str]] = {}
_REPEAT: Final = {RETRY: "1", FAILED: ",".join((*_HOSTS, CUT))}
"""Headers with which the front door repeats a request without a decision of the service about the retry."""


def build_local_replies(max_body_bytes: int, *, retries: bool = False) -> hcm.LocalReplyConfig:
    """Build the table of Envoy's own responses.

    For Envoy a refusal of the service (an ``ImmediateResponse``) is a local reply, too. It passes unchanged, since the
    service sets its reason as dynamic metadata in the same message.

    Args:
        max_body_bytes: Limit that the error for a larger body names.
        retries: Whether the front door repeats a request that was lost before its response headers were committed. The
            service removes the retry headers if it decides otherwise. It cannot do so if its process is gone, or if
            the response headers were still held, since Envoy calls no filter then. In the second case the service
            counts the loss when the request arrives again.
    """
    failed = accesslog.AccessLogFilter(response_flag_filter=accesslog.ResponseFlagFilter(flags=_UPSTREAM_FAILED))
    lost = accesslog.AccessLogFilter(and_filter=accesslog.AndFilter(filters=[_status(_Op.GE, 500), failed]))
    repeat = _REPEAT if retries else {}
    too_large = f"The request body is larger than {max_body_bytes} bytes."
    unavailable = "The routing service did not place the request; it may be starting or down. Try again."
    refused = "The proxy refused the request: %RESPONSE_CODE_DETAILS%"
    mappers = [
        hcm.ResponseMapper(filter=_refusal_of_the_service()),
        *([_lost_while_held()] if retries else []),
        _error(_status(_Op.EQ, 413), _REQUEST_ERROR, "request_too_large", too_large),
        _error(lost, _FLEET_ERROR, "upstream_failed", "The request got no answer: %LOCAL_REPLY_BODY%", repeat),
        _error(_status(_Op.EQ, 503), _FLEET_ERROR, "service_unavailable", unavailable),
        _error(_status(_Op.GE, 500), _FLEET_ERROR, "proxy_error", "The proxy failed: %RESPONSE_CODE_DETAILS%"),
        _error(_status(_Op.GE, 400), _REQUEST_ERROR, "request_refused", refused),
    ]
    return commented(hcm.LocalReplyConfig(mappers=mappers), "Envoy's own errors in the shape of OpenAI errors.")


def _lost_while_held() -> hcm.ResponseMapper:
    lost = ExpressionFilter(expression='response.code_details.startsWith("upstream_reset_after_response_started")')
    extension = accesslog.ExtensionFilter(name="envoy.access_loggers.extension_filters.cel", typed_config=pack(lost))
    return _error(
        accesslog.AccessLogFilter(extension_filter=extension),
        _FLEET_ERROR,
        "upstream_failed",
        "The server was lost before its answer had begun: %RESPONSE_CODE_DETAILS%",
        _REPEAT,
    )


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


def _error(
    when: accesslog.AccessLogFilter, kind: str, code: str, message: str, headers: Mapping[str, str] = _NO_HEADERS
) -> hcm.ResponseMapper:
    error = {"message": message, "type": kind, "param": _NULL, "code": code}
    added = [core.HeaderValue(key=name, value=value) for name, value in headers.items()]
    return hcm.ResponseMapper(
        filter=when,
        headers_to_add=[core.HeaderValueOption(header=header) for header in added],
        body_format_override=core.SubstitutionFormatString(json_format=Struct.from_dict({"error": error})),
    )
