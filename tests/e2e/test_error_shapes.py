"""Errors of the service reach clients through Envoy in the shape of their path."""

from typing import Any

import pytest

from e2e.stack import Stack

ANTHROPIC: dict[str, Any] = {"type": "error", "error": {"type": "invalid_request_error"}}
KIND: dict[str, Any] = {"type": "invalid_request_error", "param": None}
OPENAI: dict[str, Any] = {"error": {**KIND, "code": "invalid_json"}, "object": "error", **KIND, "code": 400}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        pytest.param("/v1/messages", ANTHROPIC, id="messages"),
        pytest.param("/v1/responses", OPENAI, id="responses"),
        pytest.param("/generate", OPENAI, id="generate"),
        pytest.param("/v1/completions", OPENAI, id="completions"),
        pytest.param("/v1/chat/completions", OPENAI, id="chat"),
    ],
)
def test_error_of_the_service_has_the_shape_of_its_path(newest: Stack, path: str, shape: dict[str, Any]) -> None:
    """Official clients read OpenAI's and Anthropic's shapes, and scripts for SGLang read its own."""
    response = newest.client.post(path, content=b'{"model":', headers={"content-type": "application/json"})
    body: dict[str, Any] = response.json()

    assert response.status_code == 400
    message = body["error"].pop("message")
    assert "is not valid JSON" in message
    assert body.pop("message", message) == message
    assert body == shape
