"""Errors of the service reach clients through Envoy in the shape of their path."""

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, run_stack

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


FORMS: dict[str, dict[str, Any]] = {"mirrored": {}, "sent by the service": {"prefill_leg": "service"}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}


@pytest.fixture(scope="module", params=FORMS)
def failing(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Give a fleet whose failures are not tried again by the service."""
    with run_stack(retry={"attempts": 1}, **FORMS[request.param]) as stack:
        yield stack


@pytest.fixture
def decode(failing: Stack) -> Iterator[Any]:
    """Give the decode engine, without faults at the end."""
    (engine,) = failing.decodes
    yield engine
    engine.heal()


@pytest.mark.parametrize("status", [400, 500, 503])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_error_of_decode_has_the_member_that_clients_read(failing: Stack, decode: Any, path: str, status: int) -> None:
    """SGLang answers with flat members on OpenAI's paths, which official clients do not read."""
    decode.fault(inference=str(status))
    response = failing.client.post(path, json=CHAT)
    body = response.json()

    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    masked = path == "/v1/messages" and status >= 500
    expected = "Internal server error" if masked else "a fault is switched on"
    assert body["error"]["message"] == expected
    assert body.get("message", expected) == expected
    assert (body.get("type") == "error") is (path == "/v1/messages")


def test_error_of_decode_without_its_text_ends_in_time(failing: Stack, decode: Any) -> None:
    """An engine that hangs behind the head of its error holds no client for long."""
    decode.fault(inference={"kind": "400", "seconds": 60})
    response = failing.client.post("/v1/chat/completions", json=CHAT)

    assert response.status_code == 400
    assert "did not arrive in" in response.json()["error"]["message"]
