"""The log probabilities of an echoed prompt, put from prefill's answer into the client's."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.response.echo import EchoedLogprobs, read_echo
from dp_extproc.response.merging import Merger, StreamMerger, WholeMerger

Entries = list[tuple[str, float | None]]
PROMPT: Entries = [("a", None), ("né", -1.5)]
OTHER: Entries = [("x", None)]
OUTPUT: Entries = [(" is", -0.25), (" it", -2.0)]


def logprobs(*lists: Entries) -> dict[str, Any]:
    entries = [entry for each in lists for entry in each]
    return {
        "text_offset": [-1] * len(entries),
        "token_logprobs": [score for _, score in entries],
        "tokens": [token for token, _ in entries],
        "top_logprobs": [None if score is None else {token: score} for token, score in entries],
    }


def choice(index: int, *lists: Entries, text: str = "") -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs(*lists) if lists else None, "finish_reason": None}


def completion(*choices: dict[str, Any], prompt_tokens: int = 3) -> dict[str, Any]:
    return {"id": "c", "choices": list(choices), "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}}


def known() -> EchoedLogprobs:
    """Prefill's answer to two prompts: it has one token of the output behind those of each prompt."""
    prefill = completion(choice(0, PROMPT, OUTPUT[:1]), choice(1, OTHER, OUTPUT[:1]))
    found = read_echo(json.dumps(prefill).encode())
    assert found is not None
    return found


def fed(merger: Merger, text: bytes, *cuts: int) -> bytes:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(places)]
    last = len(pieces) - 1
    return b"".join(merger.feed(piece, end_of_stream=number == last) for number, piece in enumerate(pieces))


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


STREAM = sse(
    completion(choice(1, OUTPUT[:1])),
    completion(choice(0, OUTPUT[:1])),
    completion(choice(0, OUTPUT[1:])),
    completion(),
)


@given(cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_prompts_come_first_in_a_whole_response(cuts: list[int]) -> None:
    """Each choice gets its own, and all else stays as it is."""
    decode = completion(choice(0, OUTPUT, text="né is it"), choice(1, OUTPUT))

    merged = json.loads(fed(WholeMerger(known()), json.dumps(decode).encode(), *cuts))

    assert merged == completion(choice(0, PROMPT, OUTPUT, text="né is it"), choice(1, OTHER, OUTPUT))


@given(cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_prompts_are_in_the_first_event_of_each_choice(cuts: list[int]) -> None:
    """Later events, and those without a choice, stay as they are."""
    merger = StreamMerger(known())
    merged = fed(merger, STREAM, *cuts)

    assert merged.endswith(b"data: [DONE]\n\n")
    assert [json.loads(line[6:]) for line in merged.splitlines()[:-2] if line] == [
        completion(choice(1, OTHER, OUTPUT[:1])),
        completion(choice(0, PROMPT, OUTPUT[:1])),
        completion(choice(0, OUTPUT[1:])),
        completion(),
    ]
    assert merger.problem is None


def test_numbers_stay_as_they_are_written() -> None:
    """No digit is lost or added."""
    prefill = (
        b'{"choices":[{"index":0,"logprobs":{"tokens":["a","b"],"token_logprobs":[1.50,1e-7]}}],'
        b'"usage":{"prompt_tokens":1}}'
    )
    found = read_echo(prefill)
    assert found is not None

    merged = fed(
        WholeMerger(found), b'{"x":0.10,"choices":[{"index":0,"logprobs":{"tokens":["b"],"token_logprobs":[1e-7]}}]}'
    )

    assert b'"token_logprobs":[1.50,1e-7]' in merged
    assert b'"x":0.10' in merged


@pytest.mark.parametrize(
    "prefill",
    [
        completion(choice(0, PROMPT, OUTPUT[:1])),
        completion(choice(0, OUTPUT[:1]), prompt_tokens=2),
        completion(choice(0)),
        {"error": {"message": "no"}},
    ],
    ids=["too few", "only the output", "null", "error"],
)
def test_nothing_is_read_of_an_answer_without_each_token_of_the_prompt(prefill: dict[str, Any]) -> None:
    """A part of a prompt would be taken for the whole."""
    assert read_echo(json.dumps(prefill).encode()) is None


@pytest.mark.parametrize(
    "decode",
    [completion(choice(0, OUTPUT)), completion(choice(0, OUTPUT), choice(2, OUTPUT)), completion(choice(0), choice(1))],
    ids=["one choice", "another index", "no log probabilities"],
)
def test_a_response_that_does_not_fit_is_lost(decode: dict[str, Any]) -> None:
    """Nothing of it is given, and the problem has the reason."""
    merger = WholeMerger(known())

    assert fed(merger, json.dumps(decode).encode()) == b""
    assert merger.problem


@given(st.binary(max_size=60))
def test_reader_survives_any_bytes(prefill: bytes) -> None:
    """Whatever a prefill engine answers."""
    assert read_echo(prefill) is None
