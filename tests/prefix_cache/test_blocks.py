"""Two prompts share a beginning as far as their chains are equal."""

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
    """Give the bytes that two prompts are known to have in common at their beginning."""
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
def test_the_same_prompt_is_wholly_shared(api: Api, body: dict[str, Any]) -> None:
    """Whatever stands beside it; and a prompt that differs from its first word on shares nothing."""
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
def test_what_has_a_cache_of_its_own_shares_nothing(key: str) -> None:
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
def test_what_stands_before_the_conversation_comes_first(api: Api, key: str, body: dict[str, Any]) -> None:
    """Tools and system prompts are shared by conversations that have nothing else in common, and divide those."""
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
def test_some_prompts_have_none(api: Api, body: dict[str, Any]) -> None:
    """A batch has several prompts, embeddings no text, and a few words are not worth it."""
    assert chain(api, **body) == NO_PREFIX


def test_token_ids_of_a_chat_are_its_prompt() -> None:
    """Its messages, which the engine does not read then, are no part of it."""
    ids = list(range(1000))
    one = chain(Api.CHAT, messages=[user("one")], input_ids=ids)

    assert one == chain(Api.CHAT, messages=[user(TEXT)], input_ids=ids)
    assert not shared(one, chain(Api.CHAT, messages=[user("one")], input_ids=ids[::-1]))
    assert chain(Api.CHAT, messages=[user(TEXT)], input_ids=None) == chain(Api.CHAT, messages=[user(TEXT)])


def test_long_prompts_have_few_blocks_of_which_they_share_those_that_are_equal() -> None:
    """A megabyte has fewer than a hundred; of what two long prompts share at most a sixteenth is not seen."""
    long = chain(Api.GENERATE, text="y" * (1 << 20))
    longer = chain(Api.GENERATE, text="y" * (3 << 20))

    assert len(long.blocks) < 100
    assert shared(long, longer) > (1 << 20) * 15 / 16


@given(st.integers(0, 300_000), st.integers(0, 300_000))
def test_the_chain_tells_how_much_is_shared(common: int, rest: int) -> None:
    """Of two prompts with so many equal bytes never more, and less by a kibibyte or a sixteenth at most."""
    one = chain(Api.GENERATE, text="y" * common + "a" * rest)
    two = chain(Api.GENERATE, text="y" * common + "b" * rest)
    told = shared(one, two)

    assert told <= common + 1  # the opening quote
    assert common - told <= max(1024, common / 16)


@pytest.mark.parametrize("ends", [(1, 2), (0, 0, 0), (1, 3, 2), (-1, 2, 3), (1, 2, 3, 4)])
def test_a_chain_that_does_not_fit_is_refused(ends: tuple[int, ...]) -> None:
    """What another replica has sent is checked when it is read."""
    told = msgspec.msgpack.encode({"blocks": (1, 2, 3), "ends": ends})

    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(told, type=Prefix)


def test_replicas_can_tell_each_other() -> None:
    """A chain survives the wire, and is the same in every process."""
    prefix = chain(Api.GENERATE, text="z" * 3000)

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(prefix), type=Prefix) == prefix
    assert prefix.blocks[0] == 2544349066673301444
