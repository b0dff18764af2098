"""Log probabilities of the prompt, which live on the prefill leg, in the answer that the client gets."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from e2e.stack import Stack, run_stack
from patience import wait_for

PROMPT = "twelve bytes"  # three tokens
ASKED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [7]}
KEYS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


@pytest.fixture(scope="module", params=["off", "first_event"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A fleet with the least supervision, and the most."""
    with run_stack(supervision={"mode": request.param}) as stack:
        yield stack


@pytest.fixture
def mortal() -> Iterator[Stack]:
    """A fleet of its own, whose service may die."""
    with run_stack() as stack:
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


def test_the_service_dies_while_the_answer_is_merged(mortal: Stack) -> None:
    """The client gets the engine's own answer, whole, as good as it is; never the end of one behind a 200."""
    (decode,) = mortal.decodes
    decode.fault(inference={"kind": "slow", "after": 1, "seconds": 60})
    asked = {**body(PROMPT, stream=False), **ASKED}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(mortal.client.post, "/generate", json=asked)
        wait_for(lambda: [record for record in decode.requests() if record["answer_status"] == 200])
        mortal.service.stop(signal.SIGKILL)
        decode.heal()

    assert answer.result().status_code == 200
    assert len(answer.result().json()["meta_info"]["output_token_logprobs"]) == 4


@pytest.fixture(scope="module")
def duplex() -> Iterator[Stack]:
    with run_stack(envoy={"body_mode": "full_duplex_streamed"}) as stack:
        yield stack


def test_log_probabilities_of_the_prompt_are_refused_in_duplex(duplex: Stack) -> None:
    """There Envoy lets nobody change an answer; one without what was asked for would be worse than none."""
    refused = duplex.client.post("/generate", json={**body(PROMPT, stream=False), **ASKED})

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_value"
    assert duplex.received() == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_log_probabilities_of_the_answer_are_told_in_duplex(duplex: Stack, stream: bool) -> None:
    """They are decode's, so nothing has to be changed."""
    for meta in metas(duplex, body(PROMPT, stream=stream, return_logprob=True, logprob_start_len=-1)):
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]


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
