"""Bad requests get an OpenAI-shaped error with a remedy, and never reach an engine."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest

from e2e.stack import Stack

JSON = {"content-type": "application/json"}
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True, slots=True)
class Mistake:
    """A request that the service must reject."""

    content: bytes
    path: str = "/v1/completions"
    method: str = "POST"
    content_type: str = "application/json"
    encoding: str = "identity"


@pytest.mark.parametrize(
    ("mistake", "status", "code"),
    [
        pytest.param(Mistake(b""), 400, "empty_body", id="empty body"),
        pytest.param(Mistake(b"  \n"), 400, "empty_body", id="blank body"),
        pytest.param(Mistake(b'{"prompt": "p"'), 400, "invalid_json", id="cut off"),
        pytest.param(Mistake(b"prompt=p"), 400, "invalid_json", id="no json"),
        pytest.param(Mistake(b'{"prompt":"\xff"}'), 400, "invalid_json", id="no utf-8"),
        pytest.param(Mistake(b'["p"]'), 400, "body_not_an_object", id="a list"),
        pytest.param(Mistake(b'{"max_tokens":1}'), 400, "missing_field", id="no prompt"),
        pytest.param(Mistake(b'{"prompt":{"a":1}}'), 400, "wrong_type", id="prompt object"),
        pytest.param(Mistake(b'{"prompt":"p","n":"2"}'), 400, "unsupported_value", id="n a text"),
        pytest.param(Mistake(b'{"prompt":"p","n":2}'), 400, "unsupported_value", id="n of 2"),
        pytest.param(Mistake(b'{"prompt":"p","model":7}'), 400, "wrong_type", id="model a number"),
        pytest.param(Mistake(b'{"messages":"hi"}', "/v1/chat/completions"), 400, "wrong_type", id="messages a text"),
        pytest.param(Mistake(b'{"text":"a",}', "/generate"), 400, "invalid_json", id="comma behind the last"),
        pytest.param(
            Mistake(gzip.compress(b'{"prompt":"p"}'), encoding="gzip"), 415, "compressed_body", id="compressed"
        ),
        pytest.param(
            Mistake(b"prompt=p", content_type="application/x-www-form-urlencoded"),
            415,
            "unsupported_media_type",
            id="form",
        ),
        pytest.param(Mistake(b"{}", "/v2/nothing"), 404, "unknown_path", id="unknown path"),
        pytest.param(Mistake(b"{}", "/v1//completions"), 404, "unknown_path", id="doubled slash"),
        pytest.param(Mistake(b"{}", "/v1/%63ompletions"), 404, "unknown_path", id="escaped letter"),
        pytest.param(Mistake(b"", method="GET"), 405, "method_not_allowed", id="GET of a POST path"),
        pytest.param(Mistake(b"", "/generate", "DELETE"), 405, "method_not_allowed", id="DELETE"),
        pytest.param(Mistake(b"{}", "/health"), 405, "method_not_allowed", id="POST of a GET path"),
        pytest.param(Mistake(b"{}", "/v1/score"), 400, "path_cannot_carry_routing_fields", id="score"),
        pytest.param(Mistake(b"{}", "/api/chat"), 400, "path_cannot_carry_routing_fields", id="ollama"),
        pytest.param(Mistake(b"{}", "/v1/embeddings"), 400, "path_cannot_carry_routing_fields", id="embeddings"),
        pytest.param(Mistake(b'{"rid":""}', "/abort_request"), 400, "missing_field", id="abort of everything"),
        pytest.param(Mistake(b"", "/flush_cache"), 403, "path_refused", id="administration"),
    ],
)
def test_a_bad_request_is_rejected_with_its_status_and_code(
    every_mode: Stack, mistake: Mistake, status: int, code: str
) -> None:
    """Each kind of mistake has its status and code, in the body and in a header, and no engine receives it."""
    response = every_mode.client.request(
        mistake.method,
        mistake.path,
        content=mistake.content,
        headers={"content-type": mistake.content_type, "content-encoding": mistake.encoding},
    )
    error = response.json()["error"]

    assert (response.status_code, error["code"]) == (status, code)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-dp-extproc-reason"] == code
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert every_mode.received() == []


def test_a_body_is_rejected_if_its_declared_length_is_too_large(every_mode: Stack) -> None:
    """The declared length is too large, so the 413 comes without waiting for the body."""
    connection = HTTPConnection(str(every_mode.service.config.envoy.inference), timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(40 << 20))
    connection.endheaders(b'{"prompt":"')
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    connection.close()

    assert (response.status, error["code"]) == (413, "body_too_large")
    assert every_mode.received() == []


def test_a_chunked_body_is_rejected_when_it_exceeds_the_limit(every_mode: Stack) -> None:
    """A chunked body is rejected once it exceeds the limit."""

    def too_much() -> Iterator[bytes]:
        yield b'{"prompt":"'
        for _ in range(40):
            yield b"x" * (1 << 20)

    try:
        response = every_mode.client.post("/v1/completions", content=too_much(), headers=JSON)
    except httpx.WriteError:
        pass  # the rest of the upload met a closed connection, as HTTP/1 allows
    else:
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert every_mode.received() == []


@pytest.mark.parametrize(
    ("call", "code"),
    [
        pytest.param({"model": "any", "messages": "hi"}, "wrong_type", id="wrong type"),
        pytest.param({**CHAT, "n": 3}, "unsupported_value", id="n"),
    ],
)
def test_the_openai_client_raises_its_exception_on_a_rejection(newest: Stack, call: dict[str, Any], code: str) -> None:
    """The OpenAI client raises its own exception, with the code of the service."""
    url = f"{newest.envoy.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="key", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.chat.completions.create(**call)

    assert refused.value.code == code
    assert newest.received() == []


def test_an_engine_error_reaches_the_client_unchanged(newest: Stack) -> None:
    """The client gets a rejection by an engine with the engine's own text."""
    response = newest.client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 100_000_000})

    assert response.status_code == 400
    assert "x-dp-extproc-reason" not in response.headers
    assert "maximum context length" in response.json()["message"]
    # from either leg, whichever was first; the other may have been ended before it reached its engine
    assert newest.received()
