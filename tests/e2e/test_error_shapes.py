"""Errors of the service reach clients through Envoy in the shape of their path."""

from typing import Any

import pytest

from e2e.stack import Stack

OPENAI: dict[str, Any] = {"type": "invalid_request_error", "param": None, "code": "invalid_json"}
SGLANG: dict[str, Any] = {"object": "error", "type": "Bad Request", "param": None, "code": 400}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        pytest.param("/v1/messages", {"type": "error", "error": {"type": "invalid_request_error"}}, id="messages"),
        pytest.param("/v1/responses", {"error": OPENAI}, id="responses"),
        pytest.param("/generate", {"error": OPENAI}, id="generate"),
        pytest.param("/v1/completions", {"error": OPENAI, **SGLANG}, id="completions"),
        pytest.param("/v1/chat/completions", {"error": OPENAI, **SGLANG}, id="chat"),
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
