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


ECHO = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
"""What lm-eval-harness sends beside the prompt."""
PROMPTS: dict[str, Any] = {
    "text": PROMPT,
    "texts": [PROMPT, "four"],
    "ids": [11, 12, 13, 14],
    "batch": [[11, 12, 13], [7]],
}


def choices(stack: Stack, asked: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Send a request to /v1/completions, and return its choices as one server would answer, by their index."""
    response = stack.client.post("/v1/completions", json=asked)
    assert response.status_code == 200
    if not asked["stream"]:
        return {each["index"]: each for each in response.json()["choices"]}
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    found: dict[int, dict[str, Any]] = {}
    for each in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
        before = found.setdefault(each["index"], {"text": "", "logprobs": {key: [] for key in each["logprobs"]}})
        before["text"] += each["text"]
        for key, entries in each["logprobs"].items():
            before["logprobs"][key] += entries
    return found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_log_probabilities_of_an_echoed_prompt_are_in_the_response(
    stack: Stack, prompt: Any, stream: bool, tokens: int
) -> None:
    """Each choice has one entry for each token of its prompt and of its output, as one server has them."""
    found = choices(stack, {"model": "m", "prompt": prompt, "stream": stream, **ECHO, "max_tokens": tokens})

    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert set(found) == set(range(len(prompts)))
    for index, each in enumerate(prompts):
        count = len(each) // 4 if isinstance(each, str) else len(each)
        logprobs = found[index]["logprobs"]
        assert {key: len(entries) for key, entries in logprobs.items()} == dict.fromkeys(logprobs, count + tokens)
        assert "".join(logprobs["tokens"]) == found[index]["text"]
        assert logprobs["token_logprobs"][0] is None
        assert None not in logprobs["token_logprobs"][1:]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_that_would_lack_the_prompt_is_an_error(stack: Stack, stream: bool) -> None:
    """An evaluation would score what is left as if it were the whole."""
    (prefill,) = stack.prefills
    prefill.fault(inference={"kind": "reset", "after": 1, "times": 1})
    try:
        asked = {"model": "m", "prompt": PROMPT, "stream": stream, **ECHO}
        response = stack.client.post("/v1/completions", json=asked)
    finally:
        prefill.heal()

    text = response.text.removeprefix("data: ").removesuffix("data: [DONE]\n\n")
    assert json.loads(text)["error"]["code"] == "answer_incomplete"
    assert response.status_code == (200 if stream else 502)


@pytest.mark.parametrize("param", ["return_hidden_states", "return_routed_experts"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_rows_of_the_prompt_that_no_engine_has_are_rejected(stack: Stack, path: str, param: str) -> None:
    """Decode's response would have a part of them only."""
    stack.forget()
    asked = {"text": PROMPT, "prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}], param: True}
    refused = stack.client.post(path, json=asked)
    passed = stack.client.post(path, json={**asked, param: False, "stream": False})

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert passed.status_code == 200


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


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/generate", {**body(PROMPT, stream=False), **ASKED}, "return_logprob"),
        ("/v1/completions", {"model": "m", "prompt": PROMPT, **ECHO}, "logprobs"),
    ],
)
def test_log_probabilities_of_the_prompt_are_rejected_in_full_duplex(
    duplex: Stack, path: str, asked: dict[str, Any], param: str
) -> None:
    """In full-duplex mode Envoy lets no filter change a response, and one without these values would be wrong."""
    refused = duplex.client.post(path, json=asked)

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported_value"
    assert refused.json()["error"]["param"] == param
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
