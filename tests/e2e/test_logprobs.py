"""Log probabilities of the prompt, which live on the prefill leg, in the answer that the client gets."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, run_stack

PROMPT = "twelve bytes"  # three tokens
ASKED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [7]}
KEYS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


@pytest.fixture(scope="module", params=["off", "answers"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A fleet with the least supervision, and the most."""
    with run_stack(supervision={"mode": request.param}) as stack:
        yield stack


def body(text: str | list[str], *, stream: bool, **more: Any) -> dict[str, Any]:
    return {"text": text, "stream": stream, "sampling_params": {"max_new_tokens": 4}, **more}


def metas(stack: Stack, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a request, and give the meta_info of each answer, or of each event."""
    response = stack.client.post("/generate", json=asked)
    assert response.status_code == 200
    if asked["stream"]:
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line)["meta_info"] for line in lines[:-1]]
    found = response.json()
    return [each["meta_info"] for each in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("text", [PROMPT, [PROMPT, PROMPT]], ids=["scalar", "batch"])
def test_prompt_is_told(stack: Stack, text: str | list[str], stream: bool) -> None:
    """Every answer and every event has one list per token of the prompt, and the first token's named ones."""
    found = metas(stack, body(text, stream=stream, **ASKED))

    assert found
    for meta in found:
        assert {key: len(meta[key]) for key in KEYS} == dict.fromkeys(KEYS, meta["prompt_tokens"])
        assert [entry[1] for entry in meta["input_token_logprobs"]] == list(memoryview(PROMPT.encode()).cast("I"))
        assert None not in meta["output_token_ids_logprobs"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_large(stack: Stack, stream: bool) -> None:
    """Answers of megabytes, on both legs, larger than what Envoy buffers, come whole."""
    tokens = 2000

    asked = {**body("x" * 4 * tokens, stream=stream), **ASKED, "top_logprobs_num": 10}
    found = metas(stack, asked)

    assert {len(meta["input_top_logprobs"]) for meta in found} == {tokens}


def test_only_the_answer_is_asked_for(stack: Stack) -> None:
    """Without ``logprob_start_len`` there is nothing of the prompt, and nothing is made up."""
    (meta,) = metas(stack, body(PROMPT, stream=False, return_logprob=True))

    assert meta["input_token_logprobs"] == []
    assert len(meta["output_token_logprobs"]) == 4
    assert not {"input_top_logprobs", "input_token_ids_logprobs"} & meta.keys()


def test_nothing_is_asked_for(stack: Stack) -> None:
    """Who does not ask for log probabilities gets the engine's bytes, with their length."""
    response = stack.client.post("/generate", json=body(PROMPT, stream=False))

    assert "content-length" in response.headers
    assert not set(KEYS) & response.json()["meta_info"].keys()
