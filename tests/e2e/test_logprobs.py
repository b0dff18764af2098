"""The client's response has the log probabilities of the prompt, which only the prefill leg has."""

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
    """Give a fleet with the least supervision, and one with the most."""
    with run_stack(supervision={"mode": request.param}) as stack:
        yield stack


@pytest.fixture
def mortal() -> Iterator[Stack]:
    """Give a separate fleet, whose service may die."""
    with run_stack() as stack:
        yield stack


def body(text: str | list[str], *, stream: bool, **more: Any) -> dict[str, Any]:
    return {"text": text, "stream": stream, "sampling_params": {"max_new_tokens": 4}, **more}


def metas(stack: Stack, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a request, and return the ``meta_info`` of each response or event."""
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
def test_log_probabilities_of_the_prompt_are_in_the_response(stack: Stack, text: str | list[str], stream: bool) -> None:
    """Every response and event has one list per token of the prompt, and the named ones of the first token."""
    found = metas(stack, body(text, stream=stream, **ASKED))

    assert found
    for meta in found:
        assert {key: len(meta[key]) for key in KEYS} == dict.fromkeys(KEYS, meta["prompt_tokens"])
        assert [entry[1] for entry in meta["input_token_logprobs"]] == list(memoryview(PROMPT.encode()).cast("I"))
        assert None not in meta["output_token_ids_logprobs"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_log_probabilities_arrive_whole_in_large_responses(stack: Stack, stream: bool) -> None:
    """Responses of megabytes on both legs, larger than Envoy's buffers, arrive whole."""
    tokens = 2000

    asked = {**body("x" * 4 * tokens, stream=stream), **ASKED, "top_logprobs_num": 10}
    found = metas(stack, asked)

    assert {len(meta["input_top_logprobs"]) for meta in found} == {tokens}


def test_the_response_arrives_if_the_service_dies_while_it_merges(mortal: Stack) -> None:
    """The client gets the engine's own whole response, never a part of it after a 200."""
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


def test_log_probabilities_of_the_prompt_are_rejected_in_full_duplex(duplex: Stack) -> None:
    """In full-duplex mode Envoy lets no filter change a response, and one without these values would be wrong."""
    refused = duplex.client.post("/generate", json={**body(PROMPT, stream=False), **ASKED})

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_value"
    assert duplex.received() == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_log_probabilities_of_the_output_arrive_in_full_duplex(duplex: Stack, stream: bool) -> None:
    """These values are decode's, so the response needs no change."""
    for meta in metas(duplex, body(PROMPT, stream=stream, return_logprob=True, logprob_start_len=-1)):
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]


def test_log_probabilities_of_the_output_arrive_alone_if_requested(stack: Stack) -> None:
    """Without ``logprob_start_len`` the response has no values of the prompt, and the service invents none."""
    (meta,) = metas(stack, body(PROMPT, stream=False, return_logprob=True))

    assert meta["input_token_logprobs"] == []
    assert len(meta["output_token_logprobs"]) == 4
    assert not {"input_top_logprobs", "input_token_ids_logprobs"} & meta.keys()


def test_a_response_is_unchanged_without_log_probabilities(stack: Stack) -> None:
    """A client that does not ask for log probabilities gets the engine's bytes, with their length."""
    response = stack.client.post("/generate", json=body(PROMPT, stream=False))

    assert "content-length" in response.headers
    assert not set(KEYS) & response.json()["meta_info"].keys()
