"""The body of an error in the shape that clients of its path read.

1. Below ``/v1/messages`` it is the error of Anthropic's API, with the type that belongs to the status.
2. On ``/generate`` and below ``/v1/responses`` it is ``{"error": {...}}``, as SGLang sends it there.
3. On every other path it has both forms that are in use: ``error`` as OpenAI sends it, which official client libraries
   read, and beside it the members of SGLang's own ``ErrorResponse``.

The order of the members is that of the body, so that a client that shows only its beginning shows the message.
"""

from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus
from typing import Final

_NOT_OF_CLIENTS: Final = 500
"""The status from which on an error is not the client's."""


class ErrorShape(StrEnum):
    """A shape of error bodies."""

    OPENAI = "openai"
    NESTED = "nested"
    ANTHROPIC = "anthropic"


PREFIXES: Final[Mapping[ErrorShape, tuple[str, ...]]] = {
    ErrorShape.ANTHROPIC: ("/v1/messages",),
    ErrorShape.NESTED: ("/v1/responses", "/generate"),
}
"""The starts of the paths of each shape, as SGLang compares them; all other paths have :attr:`ErrorShape.OPENAI`."""

_ANTHROPIC_TYPES: Final[Mapping[int, str]] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_TIMEOUT: "timeout_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}
"""Types of Anthropic's errors; for others see :func:`_anthropic_type`."""


def shape_of(path: str) -> ErrorShape:
    """Return the shape of the errors of a path."""
    for shape, prefixes in PREFIXES.items():
        if path.startswith(prefixes):
            return shape
    return ErrorShape.OPENAI


def error_members(
    shape: ErrorShape, status: int, message: str, code: str, param: str | None = None
) -> dict[str, object]:
    """Return the members of the body of an error.

    Args:
        shape: The shape.
        status: The status of the response.
        message: What was wrong, where, and what to do.
        code: The reason, for programs. Anthropic's shape has no place for it.
        param: The member of the request that was wrong.
    """
    if shape is ErrorShape.ANTHROPIC:
        return {"type": "error", "error": {"type": _anthropic_type(status), "message": message}}
    error = {"message": message, "type": _openai_type(status), "param": param, "code": code}
    if shape is ErrorShape.NESTED:
        return {"error": error}
    return {
        "error": error,
        "object": "error",
        "message": message,
        "type": HTTPStatus(status).phrase,
        "param": param,
        "code": status,
    }


def _anthropic_type(status: int) -> str:
    kind = "invalid_request_error" if status < _NOT_OF_CLIENTS else "api_error"
    return _ANTHROPIC_TYPES.get(status, kind)


def _openai_type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < _NOT_OF_CLIENTS else "server_error"
