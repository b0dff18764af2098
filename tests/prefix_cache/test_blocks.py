"""Two prompts share a prefix as far as their blocks are equal."""

import json
from itertools import pairwise
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix, prefix_of
from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.path import Api

TEXT = "".join(f"word{number} " for number in range(4000))


def chain(api: Api, **body: Any) -> Prefix:
    request = read_body(api, json.dumps(body).encode())
    assert isinstance(request, InferenceRequest), request
    return prefix_of(request)


def shared(one: Prefix, two: Prefix) -> int:
    """Return the bytes that two prompts are found to have in common."""
    return max((end for block, end in zip(one.blocks, one.ends, strict=True) if block in two.blocks), default=0)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("api", "body"),
    [
        (Api.CHAT, {"messages": [user(TEXT)]}),
        (Api.MESSAGES, {"messages": [user(TEXT)], "max_tokens": 1}),
        (Api.RESPONSES, {"input": TEXT}),
        (Api.COMPLETIONS, {"prompt": TEXT}),
        (Api.COMPLETIONS, {"prompt": list(range(5000))}),
        (Api.GENERATE, {"text": TEXT}),
        (Api.GENERATE, {"input_ids": list(range(5000))}),
        (Api.GENERATE, {"text": None, "input_ids": list(range(5000))}),
    ],
)
def test_equal_prompts_share_all_blocks(api: Api, body: dict[str, Any]) -> None:
    """Other members make no difference; a prompt with another first word shares no block."""
    prefix = chain(api, model="m", **body)
    again = chain(api, **body, temperature=0.5, model="m", stream=True)
    other = json.loads(json.dumps(body).replace("word0", "Word0").replace("[0, 1, ", "[7, 1, "))

    assert prefix == again
    assert prefix.tokens_in(len(prefix.blocks), 900) == 900
    assert shared(prefix, chain(api, model="m", **other)) == 0


def test_a_conversation_that_goes_on_has_its_earlier_turns_as_a_prefix() -> None:
    """As the official client serialises it, each prompt is found in the next one to its last byte."""
    chains: list[Prefix] = []

    def answer(request: httpx.Request) -> httpx.Response:
        read = read_body(Api.CHAT, request.content)
        assert isinstance(read, InferenceRequest)
        chains.append(prefix_of(read))
        message = {"role": "assistant", "content": "Yes."}
        return httpx.Response(200, json={"id": "1", "choices": [{"index": 0, "message": message}]})

    transport: Any = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(api_key="none", base_url="http://x/v1", http_client=transport)
    turns: list[Any] = [{"role": "system", "content": "Be brief. Ünïcode “quotes” stay."}]
    for number in range(4):
        turns += [user(f"Question {number}: {TEXT[: 3000 + number]}")]
        client.chat.completions.create(model="m", messages=turns)
        turns += [{"role": "assistant", "content": "Yes."}]

    for earlier, later in pairwise(chains):
        assert shared(earlier, later) == earlier.ends[-1] > 3000


@pytest.mark.parametrize(
    "key",
    ["model", "lora_path", "extra_key", "cache_salt", "image_data", "video_data", "audio_data", "reasoning_effort"],
)
def test_prompts_with_different_conditions_share_nothing(key: str) -> None:
    """Another model or adapter has other keys and values for the same words; other media are other words."""
    one, two = (chain(Api.GENERATE, text=TEXT, **{key: value}) for value in ("a", "b"))

    assert shared(one, two) == 0


@pytest.mark.parametrize(
    ("api", "key", "body"),
    [
        (Api.CHAT, "tools", {"messages": [user(TEXT)]}),
        (Api.MESSAGES, "system", {"messages": [user(TEXT)], "max_tokens": 1}),
        (Api.RESPONSES, "instructions", {"input": TEXT}),
    ],
)
def test_tools_and_system_prompts_come_before_the_conversation(api: Api, key: str, body: dict[str, Any]) -> None:
    """Conversations that have nothing else in common share them, and other ones differ from them on."""
    value: Any = [{"type": "function", "function": {"name": TEXT[:4000]}}] if key == "tools" else TEXT[:4000]
    other = json.loads(json.dumps(body).replace("word0", "Word0"))
    with_it, other_with_it = chain(api, **{key: value}, **body), chain(api, **{key: value}, **other)

    assert 4000 <= shared(with_it, other_with_it) < 4200
    assert shared(with_it, chain(api, **body)) == 0


@pytest.mark.parametrize(
    ("api", "body"),
    [
        (Api.COMPLETIONS, {"prompt": [TEXT, TEXT]}),
        (Api.GENERATE, {"text": [TEXT]}),
        (Api.GENERATE, {"input_ids": [[1] * 2000, [2] * 2000]}),
        (Api.GENERATE, {"input_embeds": [[0.5] * 8] * 200}),
        (Api.CHAT, {"messages": [user("hello")]}),
    ],
    ids=["batch", "batch-of-one", "batch-of-ids", "embeddings", "short"],
)
def test_some_prompts_have_no_blocks(api: Api, body: dict[str, Any]) -> None:
    """A batch has several prompts, embeddings no text, and a few words are not worth it."""
    assert chain(api, **body) == NO_PREFIX


def test_token_ids_of_a_chat_are_its_prompt() -> None:
    """The engine does not read its messages then, so that they are no part of the prefix."""
    ids = list(range(1000))
    one = chain(Api.CHAT, messages=[user("one")], input_ids=ids)

    assert one == chain(Api.CHAT, messages=[user(TEXT)], input_ids=ids)
    assert not shared(one, chain(Api.CHAT, messages=[user("one")], input_ids=ids[::-1]))
    assert chain(Api.CHAT, messages=[user(TEXT)], input_ids=None) == chain(Api.CHAT, messages=[user(TEXT)])


def test_long_prompts_have_few_blocks_and_share_the_equal_ones() -> None:
    """A megabyte has fewer than a hundred; at most a sixteenth of a common prefix is missed."""
    long = chain(Api.GENERATE, text="y" * (1 << 20))
    longer = chain(Api.GENERATE, text="y" * (3 << 20))

    assert len(long.blocks) < 100
    assert shared(long, longer) > (1 << 20) * 15 / 16


@given(st.integers(0, 300_000), st.integers(0, 300_000))
def test_shared_blocks_measure_the_common_prefix(common: int, rest: int) -> None:
    """Their bytes never exceed it, and miss a kibibyte or a sixteenth of it at most."""
    one = chain(Api.GENERATE, text="y" * common + "a" * rest)
    two = chain(Api.GENERATE, text="y" * common + "b" * rest)
    found = shared(one, two)

    assert found <= common + 1  # the opening quote
    assert common - found <= max(1024, common / 16)


@pytest.mark.parametrize("ends", [(1, 2), (0, 0, 0), (1, 3, 2), (-1, 2, 3), (1, 2, 3, 4)])
def test_blocks_and_ends_that_do_not_fit_are_refused(ends: tuple[int, ...]) -> None:
    """A prefix of a peer is checked when it is decoded."""
    found = msgspec.msgpack.encode({"blocks": (1, 2, 3), "ends": ends})

    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(found, type=Prefix)


def test_a_prefix_is_the_same_in_every_replica() -> None:
    """It survives the wire, and does not depend on the process."""
    prefix = chain(Api.GENERATE, text="z" * 3000)

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(prefix), type=Prefix) == prefix
    assert prefix.blocks[0] == 2544349066673301444
