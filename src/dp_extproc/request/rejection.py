"""The refusal of a request as a value: a status, a reason for machines, and a message with what to do."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from dp_extproc.request.error_shapes import ErrorShape, error_members


class Reason(StrEnum):
    """Why a request was refused, as ``code`` of the body, in a response header, and in the response-code details."""

    UNKNOWN_PATH = "unknown_path"
    PATH_REFUSED = "path_refused"
    WRONG_METHOD = "method_not_allowed"
    CANNOT_CARRY_ROUTING = "path_cannot_carry_routing_fields"
    COMPRESSED_BODY = "compressed_body"
    NOT_JSON = "unsupported_media_type"
    BODY_TOO_LARGE = "body_too_large"
    EMPTY_BODY = "empty_body"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "body_not_an_object"
    WRONG_TYPE = "wrong_type"
    MISSING_FIELD = "missing_field"
    UNSUPPORTED_VALUE = "unsupported_value"
    MODEL_MISSING = "model_missing"
    MODEL_NOT_FOUND = "model_not_found"
    NO_ENDPOINTS = "no_endpoints"
    NO_COMPATIBLE_PAIR = "no_compatible_pair"
    ENGINE_TOO_OLD = "engine_version_lacks_path"
    BODY_TIMEOUT = "body_timeout"
    UNSUPPORTED_BODY_MODE = "unsupported_body_mode"
    OVER_CAPACITY = "over_capacity"
    PROMPT_TOO_LONG = "prompt_too_long"
    DEADLY_REQUEST = "deadly_request"
    ENGINES_LOST = "engines_lost"
    FAILED_ALIKE = "failed_alike"
    PREFILL_FAILED = "prefill_failed"
    PREFILL_TIMEOUT = "prefill_timeout"
    DECODE_FAILED = "decode_failed"
    DECODE_TIMEOUT = "first_token_timeout"
    ENGINE_REFUSED = "engine_refused"
    ANSWER_INCOMPLETE = "answer_incomplete"
    ABORTED = "aborted"
    INTERNAL_ERROR = "internal_error"


TRY_AGAIN: Final = (("retry-after", "1"),)
"""Response headers of a refusal that a later try may avoid."""
_RETRIED: Final = frozenset({429, 503})
"""Statuses of refusals that end by themselves."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """The refusal of a request, as the client gets it."""

    status: int
    reason: Reason
    message: str
    param: str | None = None
    """The body field at fault."""
    headers: tuple[tuple[str, str], ...] = ()
    """Further response headers, such as ``retry-after`` or ``allow``."""

    def response_headers(self) -> tuple[tuple[str, str], ...]:
        """Return the further response headers. Every 429 and 503 has ``retry-after``, by which clients try again."""
        wants_retry = self.status in _RETRIED and all(name != "retry-after" for name, _ in self.headers)
        return (*self.headers, *TRY_AGAIN) if wants_retry else self.headers

    def body(self, shape: ErrorShape = ErrorShape.OPENAI) -> bytes:
        """Return the body in a shape of errors, from which client libraries make their exceptions."""
        return msgspec.json.encode(error_members(shape, self.status, self.message, self.reason.value, self.param))
