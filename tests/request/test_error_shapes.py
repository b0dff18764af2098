"""Errors have the shape that clients of their path read."""

import json
from typing import Any

import pytest

from dp_extproc.request.error_shapes import ErrorShape, shape_of
from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/messages", ErrorShape.ANTHROPIC),
        ("/v1/v1/messages", ErrorShape.ANTHROPIC),
        ("/v1/messages/count_tokens?beta=true", ErrorShape.ANTHROPIC),
        ("/v1/responses", ErrorShape.OPENAI),
        ("/generate", ErrorShape.OPENAI),
        ("/v1/chat/completions", ErrorShape.OPENAI),
        ("/v1/completions", ErrorShape.OPENAI),
        ("/nothing", ErrorShape.OPENAI),
        ("", ErrorShape.OPENAI),
    ],
)
def test_shape_follows_from_the_path(path: str, shape: ErrorShape) -> None:
    """SGLang compares the start of the path, too."""
    assert shape_of(path) is shape


@pytest.mark.parametrize(
    ("status", "anthropic", "openai"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (404, "not_found_error", "invalid_request_error"),
        (413, "request_too_large", "invalid_request_error"),
        (415, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "api_error", "server_error"),
        (502, "api_error", "server_error"),
        (503, "overloaded_error", "server_error"),
        (504, "timeout_error", "server_error"),
    ],
)
def test_body_has_the_members_of_its_shape(status: int, anthropic: str, openai: str) -> None:
    """Each shape has the type of the status, and the two of OpenAI the field and the reason."""
    refusal = Rejection(status, Reason.WRONG_TYPE, "n is wrong", "n")

    def read(shape: ErrorShape) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(refusal.body(shape))
        return body

    assert read(ErrorShape.ANTHROPIC) == {"type": "error", "error": {"type": anthropic, "message": "n is wrong"}}
    error = {"message": "n is wrong", "type": openai, "param": "n"}
    assert read(ErrorShape.OPENAI) == {
        "error": {**error, "code": "wrong_type"},
        "object": "error",
        **error,
        "code": status,
    }


@pytest.mark.parametrize("status", [429, 503])
def test_refusal_that_ends_by_itself_has_retry_after(status: int) -> None:
    """Client libraries wait by it; a refusal may name its own time."""
    assert Rejection(status, Reason.NO_ENDPOINTS, "m").response_headers() == TRY_AGAIN
    own = (("retry-after", "7"),)
    assert Rejection(status, Reason.NO_ENDPOINTS, "m", headers=own).response_headers() == own
    assert Rejection(400, Reason.NO_ENDPOINTS, "m").response_headers() == ()
