"""One JSON line per request, with the ranks it was placed on."""

from collections.abc import Mapping
from typing import Final

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
from envoy_data_plane.envoy.config.core.v3 import SubstitutionFormatString
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.google.protobuf import Any, Struct

from dp_extproc.contract import (
    META_DECODE_HOST,
    META_DECODE_RANK,
    META_MODEL,
    META_POOL,
    META_PREFILL_HOST,
    META_PREFILL_RANK,
    META_REASON,
    METADATA_NAMESPACE,
)

_EVERY_HOP: Final = {
    "time": "%START_TIME%",
    "request_id": "%REQ(x-request-id)%",
    "method": "%REQ(:method)%",
    "path": "%REQ(:path)%",
    "status": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
}

_PLACEMENT: Final = {
    key: f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{key})%"
    for key in (
        META_MODEL,
        META_POOL,
        META_PREFILL_HOST,
        META_PREFILL_RANK,
        META_DECODE_HOST,
        META_DECODE_RANK,
        META_REASON,
    )
}


def log_requests() -> AccessLog:
    """Log each request with its placement and, if it was refused, the reason."""
    return _stdout({"leg": "main", **_EVERY_HOP, "client": "%REQ(x-forwarded-for)%", **_PLACEMENT})


def log_prefill_legs() -> AccessLog:
    """Log each prefill leg; ``request_id`` joins it to its request."""
    return _stdout({"leg": "prefill", **_EVERY_HOP, META_PREFILL_HOST: "%UPSTREAM_HOST%"})


def _stdout(fields: Mapping[str, str]) -> AccessLog:
    line = SubstitutionFormatString(json_format=Struct.from_dict(fields))
    return AccessLog(name="envoy.access_loggers.stdout", typed_config=Any.pack(StdoutAccessLog(log_format=line)))
