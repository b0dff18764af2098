"""Unmodified clients and both legs get correct results through real Envoy, for each release that differs."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from e2e.legs import assert_legs
from e2e.stack import Stack

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie heißt 東京? 🗼"}]
CHAT: dict[str, Any] = {"model": "any", "messages": MESSAGES, "max_tokens": 6}


@pytest.fixture
def client(every_version: Stack) -> Iterator[openai.OpenAI]:
    url = f"{every_version.envoy.url}/v1"
    with openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=30) as client:
        yield client


def test_openai_chat_is_answered_by_decode(every_version: Stack, client: openai.OpenAI) -> None:
    """Decode answers a plain chat request, with usage, after both legs met."""
    answer = client.chat.completions.create(**CHAT)

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert_legs(every_version, CHAT, "/v1/chat/completions")


def test_openai_chat_streams_chunk_by_chunk(every_version: Stack, client: openai.OpenAI) -> None:
    """A streamed chat arrives chunk by chunk, with usage at the end, and prefill does not stream."""
    sent: dict[str, Any] = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**sent))

    text = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(text) == 6
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert_legs(every_version, sent, "/v1/chat/completions")


def test_openai_async_client_gets_every_response(every_version: Stack) -> None:
    """Twenty concurrent requests of the asynchronous client all get a response."""

    async def ask_all() -> list[Any]:
        url = f"{every_version.envoy.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0, timeout=30) as client:
            return await asyncio.gather(*(client.chat.completions.create(**CHAT) for _ in range(20)))

    answers = asyncio.run(ask_all())

    assert [answer.choices[0].finish_reason for answer in answers] == ["length"] * 20
    rooms = [json.loads(request["body"])["bootstrap_room"] for request in every_version.received()]
    assert len(rooms) == 40
    assert len(set(rooms)) == 20


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
def test_openai_completions_answer_a_text(every_version: Stack, client: openai.OpenAI, stream: bool) -> None:
    """The completions API works with a text prompt."""
    sent: dict[str, Any] = {"model": "any", "prompt": "once upon", "max_tokens": 4, "stream": stream}
    answer = client.completions.create(**sent)
    texts = [chunk.choices[0].text for chunk in answer if chunk.choices] if stream else [answer.choices[0].text]

    assert "".join(texts)
    assert_legs(every_version, sent, "/v1/completions")


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(["a", "bb", "ccc"], id="texts"),
        pytest.param([[1, 2], [3, 4, 5]], id="token ids"),
        pytest.param(["alone"], id="one"),
    ],
)
def test_openai_batches_have_a_room_for_each_prompt(
    every_version: Stack, client: openai.OpenAI, prompt: list[Any]
) -> None:
    """Each prompt of a batch has its own room, and all rooms lead to the one prefill rank."""
    sent: dict[str, Any] = {"model": "any", "prompt": prompt, "max_tokens": 3}
    answer = client.completions.create(**sent)

    assert sorted(choice.index for choice in answer.choices) == list(range(len(prompt)))
    assert_legs(every_version, sent, "/v1/completions", batch=len(prompt))


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
def test_generate_runs_on_the_picked_rank(every_version: Stack, stream: bool) -> None:
    """SGLang's own API works by plain HTTP, and the picked rank serves it."""
    sent: dict[str, Any] = {
        "input_ids": [1, 2, 3],
        "sampling_params": {"max_new_tokens": 5, "temperature": 0.50},
        "stream": stream,
    }
    response = every_version.client.post("/generate", json=sent)

    assert response.status_code == 200
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    answer = json.loads(events[-1]) if stream else response.json()
    assert answer["meta_info"]["completion_tokens"] == 5
    _, decode_rank = assert_legs(every_version, sent, "/generate")
    if decode_rank is not None:
        assert answer["meta_info"]["dp_rank"] == decode_rank


def test_ranks_of_both_legs_vary_independently(every_version: Stack) -> None:
    """Over many requests, every pair of ranks that the release allows is used, unequal pairs included."""
    if every_version.version < (0, 5, 10):
        pytest.skip("decode ranks are the engine's own choice in this release")
    pairs = set()
    for _ in range(200):
        every_version.forget()
        sent: dict[str, Any] = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
        assert every_version.client.post("/generate", json=sent).status_code == 200
        pairs.add(assert_legs(every_version, sent, "/generate"))
        if len(pairs) == 8:
            break

    assert len(pairs) == 8


MESSAGES_API: dict[str, Any] = {
    "model": "any",
    "max_tokens": 5,
    "messages": [{"role": "user", "content": "hello"}],
    "system": "Brief.",
}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
def test_messages_are_served_only_by_releases_that_support_them(every_version: Stack, stream: bool) -> None:
    """The Anthropic API works where the release reads its fields, and is rejected where it would kill the engine."""
    sent: dict[str, Any] = {**MESSAGES_API, "stream": stream}
    response = every_version.client.post("/v1/messages", json=sent)

    if every_version.version < (0, 5, 22):
        assert response.status_code == 400
        assert response.headers["x-dp-extproc-reason"] == "engine_version_lacks_path"
        assert every_version.received() == []
    else:
        assert response.status_code == 200
        assert_legs(every_version, sent, "/v1/messages")


def test_anthropic_client_gets_a_response(newest: Stack) -> None:
    """The official Anthropic client works with and without streaming."""
    url = newest.envoy.url
    with anthropic.Anthropic(base_url=url, api_key="key", max_retries=0, timeout=30) as client:
        answer = client.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": "hello"}])
        with client.messages.stream(model="any", max_tokens=5, messages=[{"role": "user", "content": "hi"}]) as stream:
            text = "".join(stream.text_stream)

    assert answer.usage.output_tokens == 5
    assert text


def test_responses_are_served_only_by_releases_that_support_them(every_version: Stack, client: openai.OpenAI) -> None:
    """The responses API works where the release reads its fields, and is rejected elsewhere."""
    if every_version.version < (0, 5, 20):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="any", input="hello", max_output_tokens=4)
        assert refused.value.code == "engine_version_lacks_path"
        assert every_version.received() == []
    else:
        answer = client.responses.create(model="any", input="hello", max_output_tokens=4)
        assert answer.output_text
        prefill, decode = every_version.legs()
        assert prefill["outcome"] == decode["outcome"] == "finished"
