"""The body of an error in the shape that clients of its path read.

1. On a path with ``/messages``, such as ``/v1/messages``, it is the error of Anthropic's API, with the type of the
   status.
2. On every other path it has both forms that SGLang sends: ``error`` as in OpenAI's API, which official client
   libraries read, and beside it the members of SGLang's ``ErrorResponse``.
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
    ANTHROPIC = "anthropic"


ANTHROPIC_PART: Final = "/messages"
"""Part of the paths whose errors have Anthropic's shape. It is also in that of a client with a wrong base URL."""

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
"""Types of Anthropic's errors; for others see :func:`anthropic_type`."""


def shape_of(path: str) -> ErrorShape:
    """Return the shape of the errors of a path."""
    return ErrorShape.ANTHROPIC if ANTHROPIC_PART in path else ErrorShape.OPENAI


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
        return {"type": "error", "error": {"type": anthropic_type(status), "message": message}}
    error = {"message": message, "type": openai_type(status), "param": param}
    return {"error": {**error, "code": code}, "object": "error", **error, "code": status}


def anthropic_type(status: int) -> str:
    """Return the type of an error of Anthropic's API."""
    kind = "invalid_request_error" if status < _NOT_OF_CLIENTS else "api_error"
    return _ANTHROPIC_TYPES.get(status, kind)


def openai_type(status: int) -> str:
    """Return the type of an error of OpenAI's API. SGLang itself has several for one status."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < _NOT_OF_CLIENTS else "server_error"
