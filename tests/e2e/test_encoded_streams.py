"""Streams that a hop before the decode engine compresses, or keeps alive by comments."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from e2e.stack import Stack, run_stack
from patience import wait_for

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}
FORMS: dict[str, dict[str, Any]] = {
    "mirrored": {},
    "sent in duplex": {"prefill_leg": "service", "envoy": {"body_mode": "full_duplex_streamed"}},
}


@pytest.fixture(scope="module", params=FORMS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Give a fleet that waits much longer for first events than a test may take."""
    with run_stack(
        supervision={"mode": "first_event", "prefill_timeout": "300s", "first_token_timeout": "300s"},
        **FORMS[request.param],
    ) as stack:
        yield stack


@pytest.fixture
def decode(stack: Stack) -> Iterator[Any]:
    """Give the decode engine, without faults at the end."""
    (engine,) = stack.decodes
    stack.forget()
    yield engine
    engine.heal()


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_accept_encoding_of_a_client_reaches_no_engine(stack: Stack, path: str) -> None:
    """An engine, or a hop before it, then compresses nothing."""
    stack.forget()
    body = BODY if path == CHAT else {"text": "Hi.", "sampling_params": {"max_new_tokens": 2}}
    answer = stack.client.post(path, json=body, headers={"accept-encoding": "gzip, br"})

    assert answer.status_code == 200
    legs = stack.legs()
    assert {leg["headers"].get("accept-encoding", "identity") for leg in legs} == {"identity"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_compressed_response_arrives_at_once(stack: Stack, decode: Any, stream: bool) -> None:
    """The first event of a stream cannot be read, so the stream is not held for it."""
    decode.fault(inference={"kind": "gzip"})
    answer = stack.client.post(CHAT, json={**BODY, "stream": stream})

    assert answer.status_code == 200
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.text.endswith("data: [DONE]\n\n") or answer.json()["usage"]["completion_tokens"] == 4
    assert len(decode.requests()) == 1


def test_comments_pass_before_the_first_event_once_prefill_has_answered(stack: Stack, decode: Any) -> None:
    """They keep the client's connection alive, and the stream goes on behind them."""
    decode.fault(inference={"kind": "comments", "seconds": 0.05})
    with stack.client.stream("POST", "/generate", json={"text": "Hi.", "stream": True}) as answer:
        text = answer.iter_text()
        assert next(text).startswith(": x")
        decode.heal()
        rest = "".join(text)

    assert rest.count("meta_info") > 0
    assert rest.endswith("data: [DONE]\n\n")


def test_comments_wait_for_prefill(stack: Stack, decode: Any) -> None:
    """Until it has answered, its failure can still become a retry, so no byte of the response passes."""
    (prefill,) = stack.prefills
    decode.fault(inference={"kind": "comments", "seconds": 0.05})
    prefill.fault(inference={"kind": "hang"})
    try:
        with pytest.raises(httpx.ReadTimeout):
            stack.client.post("/generate", json={"text": "Hi.", "stream": True}, timeout=1)
    finally:
        prefill.heal()
    wait_for(lambda: all(each["outcome"] != "running" for each in decode.requests()))
