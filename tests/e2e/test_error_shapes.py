"""Errors of the service reach clients through Envoy in the shape of their path."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
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


def test_wrong_type_is_named_in_the_words_of_json(newest: Stack) -> None:
    """Clients are written in many languages."""
    response = newest.client.post("/v1/completions", json={"prompt": "p", "max_tokens": [1], "model": 7})

    message = response.json()["error"]["message"]
    assert "has a wrong type: it must be " in message
    assert "`" not in message


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


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_doubled_content_type_reaches_engines_as_one(newest: Stack, path: str) -> None:
    """SGLang itself would refuse it. A client library and a wrapper around it may both set the header."""
    headers = {"content-type": "application/json, application/json"}
    body = json.dumps(CHAT | {"text": "Hi."}).encode()

    assert newest.client.post(path, content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_missing_content_type_is_answered_as_by_the_engine(newest: Stack, path: str) -> None:
    """Releases differ in whether they require the header, so theirs is the decision, and the message names it."""
    response = newest.client.post(path, content=json.dumps(CHAT).encode())

    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "content-type" in message
    assert "application/json" in message


def test_official_clients_show_the_message_of_an_engine(failing: Stack, decode: Any) -> None:
    """It is the message of the exception, and not the raw body of a response."""
    url = failing.envoy.url
    decode.fault(inference="400")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as of_openai,
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as of_anthropic,
    ):
        with pytest.raises(openai.BadRequestError) as by_openai:
            of_openai.chat.completions.create(**CHAT)
        with pytest.raises(anthropic.BadRequestError) as by_anthropic:
            of_anthropic.messages.create(**CHAT)

    assert by_openai.value.body["message"] == "a fault is switched on"  # type: ignore[index]
    assert by_anthropic.value.body["error"]["message"] == "a fault is switched on"  # type: ignore[index]


def test_official_clients_recover_from_a_503_by_their_default_retries(failing: Stack, decode: Any) -> None:
    """The first answer is the error of the only decode engine; the second one is good."""
    url = failing.envoy.url
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="k") as of_openai,
        anthropic.Anthropic(base_url=url, api_key="k") as of_anthropic,
    ):
        decode.fault(inference={"kind": "503", "times": 1})
        assert of_openai.chat.completions.create(**CHAT).choices[0].message.content
        decode.fault(inference={"kind": "503", "times": 1})
        assert of_anthropic.messages.create(**CHAT).content
