"""A body is read in every form of the five APIs, or refused with a reason and a text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.request.body import MAX_BATCH, MAX_SAMPLES, InferenceRequest, read_body
from dp_extproc.request.media import MEDIA_TOKENS
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}


def read(api: Api, body: dict[str, Any] | bytes) -> InferenceRequest:
    request = read_body(api, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert isinstance(request, InferenceRequest), request
    return request


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("api", "body", "size"),
    [
        pytest.param(Api.GENERATE, {"text": "hello"}, (5, 0, None), id="generate text"),
        pytest.param(Api.GENERATE, {"text": ["ab", "é"]}, (4, 0, 2), id="generate texts"),
        pytest.param(Api.GENERATE, {"input_ids": [1, 2, 3]}, (0, 3, None), id="generate ids"),
        pytest.param(Api.GENERATE, {"input_ids": [[1], [2, 3]]}, (0, 3, 2), id="generate lists of ids"),
        pytest.param(Api.GENERATE, {"input_embeds": [[0.1, 0.2], [0.3, 0.4]]}, (0, 2, None), id="embeddings"),
        pytest.param(Api.GENERATE, {"input_embeds": [[[0.1], [0.2]], [[0.3]]]}, (0, 3, 2), id="lists of embeddings"),
        pytest.param(Api.COMPLETIONS, {"prompt": "東京"}, (6, 0, None), id="completions text"),
        pytest.param(Api.COMPLETIONS, {"prompt": ["a"]}, (1, 0, 1), id="a batch of one"),
        pytest.param(Api.COMPLETIONS, {"prompt": [5, 6]}, (0, 2, None), id="completions ids"),
        pytest.param(Api.CHAT, {"messages": user("hello")}, (5, 0, None), id="chat"),
        pytest.param(Api.CHAT, {"messages": []}, (0, 0, None), id="chat of nothing"),
        pytest.param(
            Api.CHAT,
            {"messages": user([{"type": "text", "text": "what is"}, IMAGE])},
            (7, MEDIA_TOKENS, None),
            id="chat with a picture",
        ),
        pytest.param(
            Api.CHAT,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}], "tools": [{"a": 1}]},
            (len('[{"id": "x"}]') + len('[{"a": 1}]'), 0, None),
            id="chat with tools",
        ),
        pytest.param(
            Api.CHAT,
            {"messages": user({"unknown": "form", "image_url": "A" * 900})},
            (4 + 4, 0, None),
            id="unknown form",
        ),
        pytest.param(Api.RESPONSES, {"input": "abc", "instructions": "de"}, (5, 0, None), id="responses text"),
        pytest.param(
            Api.RESPONSES,
            {"input": [*user([{"type": "input_text", "text": "abc"}]), {"type": "function_call", "arguments": "{}"}]},
            (5, 0, None),
            id="responses items",
        ),
        pytest.param(
            Api.MESSAGES,
            {"system": [{"type": "text", "text": "ab"}], "messages": user("cd"), "max_tokens": 1},
            (4, 0, None),
            id="anthropic blocks",
        ),
        pytest.param(
            Api.MESSAGES,
            {"system": "ab", "messages": user([{"type": "image", "source": {"data": "A" * 999}}])},
            (2, MEDIA_TOKENS, None),
            id="anthropic picture",
        ),
    ],
)
def test_prompt_is_measured_in_every_form(api: Api, body: dict[str, Any], size: tuple[int, int, int | None]) -> None:
    """Text is measured in UTF-8 bytes, ids exactly, media by a fixed count; lists are batches."""
    prompt = read(api, body).prompt

    assert (prompt.text_bytes, prompt.tokens, prompt.batch) == size


def test_escaped_text_has_the_size_of_the_text() -> None:
    """The length of ASCII escapes does not count."""
    assert read(Api.COMPLETIONS, b'{"prompt":"\\u6771\\u4eac"}').prompt.text_bytes == 6


@pytest.mark.parametrize(
    ("api", "body", "param"),
    [
        pytest.param(Api.CHAT, {"max_tokens": "7", "max_completion_tokens": 1e3}, None, id="chat"),
        pytest.param(Api.RESPONSES, {"max_output_tokens": "5", "n": "many", "max_tokens": []}, None, id="responses"),
        pytest.param(Api.MESSAGES, {"max_tokens": 256.0, "n": 3, "priority": "x"}, None, id="messages"),
        pytest.param(Api.GENERATE, {"max_tokens": "x", "n": "x", "model": 7}, None, id="generate, fields of others"),
        pytest.param(Api.GENERATE, {"sampling_params": {"max_new_tokens": 256.0}}, None, id="generate, a float"),
        pytest.param(Api.GENERATE, {"sampling_params": {"max_new_tokens": "3"}}, "sampling_params", id="generate"),
        pytest.param(
            Api.GENERATE,
            {"sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": "8"}]},
            "sampling_params",
            id="batch",
        ),
        pytest.param(Api.GENERATE, {}, None, id="left to the engine"),
    ],
)
def test_an_output_limit_is_left_to_the_engine_unless_it_fails_at_it(
    api: Api, body: dict[str, Any], param: str | None
) -> None:
    """Engines alone use the limit, and pydantic reads it in more forms (``openai/protocol.py``).

    But ``/generate`` compares the limit of a text with 0 before 0.5.22 (``sampling_params.py``), and answers 500.
    """
    prompt = {"text": "a", "prompt": "a", "messages": user("a"), "input": "a"}
    found = read_body(api, json.dumps({**prompt, **body}).encode())

    assert (found.param if isinstance(found, Rejection) else None) == param


def test_last_of_repeated_keys_counts() -> None:
    """The JSON reader of SGLang takes the last one, too."""
    assert read(Api.COMPLETIONS, b'{"prompt":"a","model":"x","model":"y"}').model == "y"


@pytest.mark.parametrize(
    ("api", "text", "reason", "param"),
    [
        pytest.param(Api.CHAT, b"", Reason.EMPTY_BODY, None, id="empty"),
        pytest.param(Api.CHAT, b" \n\t", Reason.EMPTY_BODY, None, id="blank"),
        pytest.param(Api.CHAT, b"\xef\xbb\xbf{}", Reason.INVALID_JSON, None, id="byte order mark"),
        pytest.param(Api.CHAT, b'{"messages":[]', Reason.INVALID_JSON, None, id="cut off"),
        pytest.param(Api.CHAT, b'{"messages":[]}}', Reason.INVALID_JSON, None, id="something behind"),
        pytest.param(Api.CHAT, b'{"messages":[],}', Reason.INVALID_JSON, None, id="comma at the end"),
        pytest.param(Api.CHAT, b'{"messages":[],"x":NaN}', Reason.INVALID_JSON, None, id="NaN"),
        pytest.param(Api.CHAT, b'{"messages":[],"x":"\xff"}', Reason.INVALID_JSON, None, id="not utf-8, unread value"),
        pytest.param(Api.CHAT, b'{"messages":[],"\xff":1}', Reason.INVALID_JSON, None, id="not utf-8, key"),
        pytest.param(Api.CHAT, b'{"messages":"\\ud800"}', Reason.INVALID_JSON, None, id="half a surrogate pair"),
        pytest.param(Api.CHAT, b"[" * 100_000, Reason.NOT_AN_OBJECT, None, id="deep list"),
        pytest.param(Api.CHAT, b'{"x":' + b"[" * 100_000, Reason.INVALID_JSON, None, id="deep, cut off"),
        pytest.param(
            Api.CHAT,
            b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            Reason.INVALID_JSON,
            None,
            id="deep, well-formed",
        ),
        pytest.param(Api.CHAT, b"null", Reason.NOT_AN_OBJECT, None, id="null"),
        pytest.param(Api.CHAT, b"3", Reason.NOT_AN_OBJECT, None, id="a number"),
        pytest.param(Api.CHAT, b'[{"messages":[]}]', Reason.NOT_AN_OBJECT, None, id="a list"),
        pytest.param(Api.CHAT, b"{}", Reason.MISSING_FIELD, "messages", id="no messages"),
        pytest.param(Api.CHAT, b'{"messages":null}', Reason.MISSING_FIELD, "messages", id="null messages"),
        pytest.param(Api.CHAT, b'{"messages":"hi"}', Reason.WRONG_TYPE, "messages", id="messages a text"),
        pytest.param(Api.CHAT, b'{"messages":["hi"]}', Reason.WRONG_TYPE, "messages", id="messages of texts"),
        pytest.param(Api.CHAT, b'{"messages":[],"model":[]}', Reason.WRONG_TYPE, "model", id="model a list"),
        pytest.param(Api.COMPLETIONS, b'{"prompt":[]}', Reason.MISSING_FIELD, "prompt", id="no prompts"),
        pytest.param(Api.COMPLETIONS, b'{"prompt":["a",1]}', Reason.WRONG_TYPE, "prompt", id="texts and ids"),
        pytest.param(Api.COMPLETIONS, b'{"prompt":[1,[2]]}', Reason.WRONG_TYPE, "prompt", id="ids and lists"),
        pytest.param(Api.COMPLETIONS, b'{"prompt":[1.5]}', Reason.WRONG_TYPE, "prompt", id="fractions"),
        pytest.param(Api.GENERATE, b"{}", Reason.MISSING_FIELD, "text", id="generate nothing"),
        pytest.param(Api.GENERATE, b'{"text":"a","sampling_params":3}', Reason.WRONG_TYPE, "sampling_params", id="sp"),
        pytest.param(Api.RESPONSES, b'{"input":7}', Reason.WRONG_TYPE, "input", id="responses input"),
        pytest.param(Api.MESSAGES, b'{"messages":[],"system":7}', Reason.WRONG_TYPE, "system", id="system"),
    ],
)
def test_mistake_is_refused_with_reason_and_field(api: Api, text: bytes, reason: Reason, param: str | None) -> None:
    """Each refusal has the shape of errors of OpenAI."""
    refusal = read_body(api, text)

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason, refusal.param) == (400, reason, param)
    error = json.loads(refusal.body())["error"]
    assert error == {"message": refusal.message, "type": "invalid_request_error", "param": param, "code": reason.value}


def test_batch_beyond_the_limit_is_refused() -> None:
    """The preamble of the prefill leg, with an id for each prompt, must fit a header."""
    at, above = ({"prompt": ["a"] * count} for count in (MAX_BATCH, MAX_BATCH + 1))

    assert read(Api.COMPLETIONS, at).prompt.batch == MAX_BATCH
    refusal = read_body(Api.COMPLETIONS, json.dumps(above).encode())
    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.UNSUPPORTED_VALUE


def test_numbers_of_many_digits_are_skipped_or_refused() -> None:
    """Numbers that are not read pass; others are refused, and raise no error."""
    digits = b"9" * 5000
    assert read(Api.COMPLETIONS, b'{"prompt":"a","seed":' + digits + b"}").prompt.text_bytes == 1
    outcome = read_body(
        Api.COMPLETIONS, b'{"prompt":"a","routed_dp_rank":' + digits + b',"max_tokens":' + digits + b"}"
    )

    assert isinstance(outcome, Rejection | InferenceRequest)


VALID = [
    b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"stream":true,"n":1}',
    b'{"text":["a","b"],"sampling_params":[{"n":1},{"max_new_tokens":4}],"input_ids":[[1],[2]],"routed_dp_rank":1}',
    b'{"prompt":[[1,2],[3]],"input":[{"content":"x"}],"system":[{"type":"text","text":"s"}]}',
]


@given(
    st.sampled_from(Api),
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 110), st.integers(0, 8), st.binary(max_size=6)), max_size=3),
)
def test_edited_body_raises_nothing(api: Api, text: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """Whatever is changed in a body, the result is a request or a refusal."""
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]

    assert isinstance(read_body(api, text), InferenceRequest | Rejection)


@given(st.sampled_from(Api), st.binary(max_size=200))
def test_random_bytes_raise_nothing(api: Api, text: bytes) -> None:
    """Bytes that were never a body are refused."""
    assert isinstance(read_body(api, text), InferenceRequest | Rejection)


@given(st.integers(-3, 3) | st.integers(MAX_SAMPLES - 2, MAX_SAMPLES + 2) | st.integers(-(2**70), 2**70))
def test_invalid_number_of_answers_is_refused(n: int) -> None:
    """It would count as load: a negative one makes an engine look empty, and no peer accepts it."""
    bodies = (
        (Api.COMPLETIONS, {"prompt": "a", "n": n}),
        (Api.CHAT, {"messages": user("a"), "n": n}),
        (Api.GENERATE, {"text": "a", "sampling_params": {"n": n}}),
        (Api.GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 2}, {"n": n}]}),
    )
    for api, body in bodies:
        request = read_body(api, json.dumps(body).encode())
        if 0 <= n <= MAX_SAMPLES:
            assert isinstance(request, InferenceRequest), request
            assert 1 <= request.samples <= MAX_SAMPLES
            assert request.samples >= n
        else:
            assert isinstance(request, Rejection), request
            assert (request.status, request.reason, request.param) == (400, Reason.UNSUPPORTED_VALUE, "n")


@pytest.mark.parametrize("n", [None, 0, 1])
def test_one_answer_has_three_spellings(n: int | None) -> None:
    """SGLang reads each of them as one."""
    assert read(Api.COMPLETIONS, {"prompt": "a", "n": n}).samples == 1
