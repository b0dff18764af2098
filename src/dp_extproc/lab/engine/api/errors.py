"""Answer errors in SGLang's shapes, which differ by path and by the part that found them."""

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from dp_extproc.lab.engine.api.fields import InvalidBodyError, InvalidTypeError
from dp_extproc.lab.engine.leg import Failure, RefusedError


def json_response(content: Any, status: int = 200) -> Response:
    """Answer with compact JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def error_object(message: str, kind: str, code: int) -> dict[str, Any]:
    """Build ``ErrorResponse`` of ``openai/protocol.py``."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def invalid_body(path: str, error: InvalidBodyError) -> Response:
    """Answer like the handler of RequestValidationError."""
    count = len(error.errors)
    lines = "".join(f"  {each}\n" for each in error.errors)
    message = f"{count} validation error{'s' if count > 1 else ''}:\n{lines}\n    POST {path} {error.errors}"
    return json_response(error_object(message, "Bad Request", 400), 400)


def invalid_type(error: InvalidTypeError) -> Response:
    """Answer like the strict check of ``/generate``."""
    return json_response({"error": str(error)}, 400)


def refused(path: str, error: RefusedError) -> Response:
    """Answer a ValueError of the HTTP process."""
    return _answer(path, 400, error.message, "400" if error.in_header else "BadRequestError")


def failed(path: str, failure: Failure) -> Response:
    """Answer a failure of a scheduler."""
    status = failure.status or 500
    return _answer(path, status, failure.message, "BadRequestError" if status == 400 else str(status))


def stream_error(failure: Failure) -> dict[str, Any]:
    """Build the first and only event of a failed OpenAI stream, whose status is 200."""
    status = failure.status or 500
    return {"error": error_object(failure.message, HTTPStatus(status).name, status)}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """Build an Anthropic error; errors inside the engine are masked."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": message if status < 500 else "Internal server error"}}


def _answer(path: str, status: int, message: str, kind: str) -> Response:
    if path == "/generate" and status == 400:
        return json_response({"error": {"message": message}}, 400)
    if path == "/v1/messages":
        return json_response(anthropic_error(status, message), status)
    content = error_object(message, kind, status)
    return json_response({"error": content} if path == "/v1/responses" else content, status)
