"""The request ids that clients give: they see them in the response, and engines get others."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, body_of, run_stack

RID = 'mine "é" 1'
FORMS: dict[str, dict[str, Any]] = {
    "mirrored": {},
    "sent in duplex": {"prefill_leg": "service", "envoy": {"body_mode": "full_duplex_streamed"}},
}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "Hi.", "sampling_params": {"max_new_tokens": 3}},
    "/v1/completions": {"model": "m", "prompt": "Hi.", "max_tokens": 3},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 3},
}
BATCH = {"text": ["Hi.", "Ho."], "sampling_params": {"max_new_tokens": 3}}


@pytest.fixture(scope="module", params=FORMS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with run_stack(**FORMS[request.param]) as stack:
        yield stack


def ids_of(stack: Stack, path: str, body: dict[str, Any]) -> set[str]:
    """Send a request, and return the ids in its response, or in all of its events."""
    stack.forget()
    response = stack.client.post(path, json=body)
    assert response.status_code == 200
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    if body["stream"]:
        assert lines.pop() == "[DONE]"
    found = [json.loads(line) for line in lines]
    answers = [each for some in found for each in (some if isinstance(some, list) else [some])]
    assert answers
    return {each["meta_info"]["id"] if path == "/generate" else each["id"] for each in answers}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_id_of_a_client_is_in_the_response_and_reaches_no_engine(stack: Stack, path: str, stream: bool) -> None:
    """Engines end requests by the start of an id, so a client must not choose it."""
    assert ids_of(stack, path, {**BODIES[path], "stream": stream, "rid": RID}) == {RID}

    sent = [body_of(leg)["rid"] for leg in stack.legs()]
    assert all(each.startswith("dp") for each in sent)
    assert len(set(sent)) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("rid", "expected"), [(["a", "b"], {"a", "b"}), ("c", {"c_0", "c_1"})], ids=["list", "one"])
def test_ids_of_a_batch_are_in_the_response(stack: Stack, rid: Any, expected: set[str], stream: bool) -> None:
    """Of a single id SGLang makes one for each prompt."""
    assert ids_of(stack, "/generate", {**BATCH, "stream": stream, "rid": rid}) == expected


def test_a_response_without_an_id_of_the_client_is_unchanged(stack: Stack) -> None:
    """It has the id of the decode leg, and keeps its length."""
    response = stack.client.post("/generate", json=BODIES["/generate"])

    assert "content-length" in response.headers
    assert response.json()["meta_info"]["id"].startswith("dp")
