"""The prompt's log probabilities, put from prefill's answer into the client's."""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.response.logprobs import PromptLogprobs, read_prefill
from dp_extproc.response.merging import Merger, StreamMerger, WholeMerger

OF_PROMPT = {
    "input_token_logprobs": [[None, 72, None], [-6.2500, 73, None]],
    "input_top_logprobs": [None, [[-1.5, 9, None]]],
}
NOTHING: dict[str, Any] = {"input_token_logprobs": [], "input_top_logprobs": []}


RECORDED = Path(__file__).parent / "recorded"
"""Both legs of SGLang 0.5.23; ``make interop`` makes such files."""


def answer(meta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": "né", "meta_info": {"id": "r", **meta, "completion_tokens": 1}, **more}


def known(*metas: dict[str, Any]) -> PromptLogprobs:
    answers = [answer(meta) for meta in metas]
    found = read_prefill(json.dumps(answers if len(answers) > 1 else answers[0]).encode())
    assert found is not None
    return found


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def events_of(stream: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data:").strip() for line in stream.splitlines() if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def fed(merger: Merger, *chunks: bytes) -> bytes:
    last = len(chunks) - 1
    return b"".join(merger.feed(chunk, end_of_stream=number == last) for number, chunk in enumerate(chunks))


def test_merge_of_a_whole_response() -> None:
    """Prefill's lists come first, decode's follow, and all else is as decode said it."""
    decode = answer({**NOTHING, "input_token_logprobs": [[-3, 5, None]]})

    merger = WholeMerger(known(OF_PROMPT))
    merged = json.loads(fed(merger, json.dumps(decode).encode()))

    assert merged["meta_info"].pop("input_token_logprobs") == [[None, 72, None], [-6.25, 73, None], [-3, 5, None]]
    assert merged["meta_info"].pop("input_top_logprobs") == OF_PROMPT["input_top_logprobs"]
    assert merged == answer({})
    assert merger.problem is None


def test_numbers_stay_as_they_are_written() -> None:
    """No digit is lost or added, in either leg's values."""
    prefill = read_prefill(b'{"meta_info":{"input_token_logprobs":[[-1.10, 1e-7]]}}')
    assert prefill is not None

    merged = fed(WholeMerger(prefill), b'{"x":1.50,"meta_info":{"input_token_logprobs":[],"t":0.10}}')

    assert merged == b'{"x":1.50,"meta_info":{"input_token_logprobs":[[-1.10, 1e-7]],"t":0.10}}'


def test_merge_of_a_batch() -> None:
    """Each prompt of a batch gets its own."""
    other = {"input_token_logprobs": [[-9, 9, None]]}

    merged = json.loads(fed(WholeMerger(known(OF_PROMPT, other)), json.dumps([answer(NOTHING)] * 2).encode()))

    assert [each["meta_info"]["input_token_logprobs"] for each in merged] == [
        OF_PROMPT["input_token_logprobs"],
        other["input_token_logprobs"],
    ]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_merge_of_a_stream(newline: bytes) -> None:
    """Every event gets the prompt's, as a single server repeats them in every event; the frame stays."""
    stream = sse(answer(NOTHING), answer(NOTHING)).replace(b"\n", newline)

    merger = StreamMerger(known(OF_PROMPT))
    merged = fed(merger, stream)

    assert events_of(merged) == [answer(OF_PROMPT)] * 2
    assert merged.count(newline) == stream.count(newline)
    assert merger.problem is None


def test_merge_of_a_streamed_batch() -> None:
    """Events have the index of their prompt."""
    other = {"input_token_logprobs": [[-9, 9, None]]}
    stream = sse(answer(NOTHING, index=1), answer(NOTHING, index=0))

    first, second = events_of(fed(StreamMerger(known(OF_PROMPT, other)), stream))

    assert first["meta_info"]["input_token_logprobs"] == other["input_token_logprobs"]
    assert second["meta_info"]["input_token_logprobs"] == OF_PROMPT["input_token_logprobs"]


def test_merge_of_the_flat_form() -> None:
    """What is no list is taken over: decode has none of it."""
    flat = {"input_top_logprobs_val": "AAAA", "input_token_logprobs": None}

    merged = json.loads(fed(WholeMerger(known(flat)), json.dumps(answer(NOTHING)).encode()))

    assert merged["meta_info"]["input_top_logprobs_val"] == "AAAA"
    assert merged["meta_info"]["input_token_logprobs"] == []


@given(cuts=st.lists(st.integers(0, 400), max_size=12), whole=st.booleans())
def test_merge_does_not_depend_on_how_a_response_is_cut(cuts: list[int], whole: bool) -> None:
    """How an answer is cut makes no difference."""
    text = json.dumps(answer(NOTHING)).encode() if whole else sse(answer(NOTHING), answer(NOTHING))
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[begin:end] for begin, end in pairwise(places)]
    kind = WholeMerger if whole else StreamMerger

    assert fed(kind(known(OF_PROMPT)), *chunks) == fed(kind(known(OF_PROMPT)), text)


@given(chunks=st.lists(st.binary(max_size=40), min_size=1), whole=st.booleans())
def test_merge_survives_any_bytes(chunks: list[bytes], whole: bool) -> None:
    """What is no answer goes through byte for byte, however it is cut."""
    merger: Merger = WholeMerger(known(OF_PROMPT)) if whole else StreamMerger(known(OF_PROMPT))

    assert fed(merger, *chunks) == b"".join(chunks)


def test_merged_events_pass_at_once() -> None:
    """An event is given as soon as its line is complete, and the next one is not waited for."""
    merger = StreamMerger(known(OF_PROMPT))
    first, rest = sse(answer(NOTHING)).split(b"\n", 1)

    assert merger.feed(first, end_of_stream=False) == b""
    assert b"-6.25" in merger.feed(b"\n", end_of_stream=False)
    assert merger.feed(rest, end_of_stream=True) == rest


def counted(work: Callable[[], bytes]) -> tuple[bytes, int]:
    """Do some work, and count the calls of functions in it."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        done = work()
    finally:
        sys.setprofile(None)
    return done, calls


@pytest.mark.parametrize("line", [b"", b": x", b"event: a"], ids=["empty", "comments", "events"])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_lines_without_data_take_linear_time(line: bytes, size: int) -> None:
    """However many there are: they come to as many steps as there are chunks."""
    flood = (line + b"\n") * ((1 << 20) // (len(line) + 1))
    chunks = [flood[place : place + size] for place in range(0, len(flood), size)]
    merger = StreamMerger(known(OF_PROMPT))
    merged, steps = counted(lambda: fed(merger, *chunks))

    assert merged == flood
    assert steps < 10 * len(chunks) + 100


@pytest.mark.parametrize("line", [b"", b"data", b"data: [DONE]"])
def test_lines_around_one_with_data_take_linear_time(line: bytes) -> None:
    """An engine may put one into each chunk."""
    flood = (line + b"\n") * (1 << 16) + sse(answer(NOTHING))
    merger = StreamMerger(known(OF_PROMPT))
    merged, steps = counted(lambda: merger.feed(flood, end_of_stream=True))

    assert merged.startswith((line + b"\n") * (1 << 16))
    assert b"-6.25" in merged
    assert steps < 100


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "stream"])
def test_merge_stops_when_the_response_is_too_large(whole: bool) -> None:
    """Nothing of it is given, nor what follows, so that it cannot be taken for complete."""
    large = answer(NOTHING, pad="x" * 500)
    merger: Merger = WholeMerger(known(OF_PROMPT), 300) if whole else StreamMerger(known(OF_PROMPT), 300)
    text = json.dumps(large).encode() if whole else sse(answer(NOTHING), large, answer(NOTHING))
    chunks = [text[place : place + 50] for place in range(0, len(text), 50)]

    merged = fed(merger, *chunks)

    assert merger.problem is not None
    assert "too large" in merger.problem
    assert merged == b"" if whole else events_of(merged + b"data: [DONE]") == [answer(OF_PROMPT)]


@pytest.mark.parametrize(
    "prefill",
    [b"", b"[", b"[]x", b"{}", b'{"meta_info":3}', b'["a"]', b"\xff{}", b"[" * 100_000],
    ids=["empty", "cut", "junk", "no meta_info", "number", "text", "bytes", "deep"],
)
def test_response_passes_unchanged_when_prefill_cannot_be_read(prefill: bytes) -> None:
    """An answer of the prefill leg that is not as expected is None."""
    assert read_prefill(prefill) is None


@pytest.mark.parametrize("text", [b"no JSON", b'[{"meta_info":7},{}]'], ids=["no JSON", "no object"])
def test_response_passes_unchanged_when_it_cannot_be_read(text: bytes) -> None:
    """The client cannot take it for a complete response, either."""
    merger = WholeMerger(known(OF_PROMPT, OF_PROMPT))

    assert fed(merger, text) == text
    assert merger.problem is None


@pytest.mark.parametrize("answers", [[answer(NOTHING)] * 3, answer(NOTHING)], ids=["three", "one"])
def test_response_is_lost_when_the_legs_have_other_numbers_of_prompts(answers: Any) -> None:
    """Nothing of it is given, and the problem has the reason."""
    merger = WholeMerger(known(OF_PROMPT, OF_PROMPT))

    assert fed(merger, json.dumps(answers).encode()) == b""
    assert "number of prompts" in (merger.problem or "")


def test_errors_pass_unchanged() -> None:
    """An error is passed on without a word."""
    error = b'data: {"error":{"message":"no"}}\n\ndata: [DONE]\n\n'
    merger = StreamMerger(known(OF_PROMPT))

    assert fed(merger, error) == error
    assert merger.problem is None


@pytest.mark.parametrize("name", ["whole", "whole-batch", "stream", "stream-batch"])
def test_merge_of_recorded_responses(name: str) -> None:
    """Of real answers every one, or every event, has what the prompt's log probabilities are, one list per prompt."""
    recorded = json.loads((RECORDED / f"{name}.json").read_text())
    found = read_prefill(recorded["prefill"].encode())
    assert found is not None
    streamed, batch = recorded["request"]["stream"], "batch" in name

    merger: Merger = StreamMerger(found) if streamed else WholeMerger(found)
    merged = fed(merger, recorded["decode"].encode())

    answers = events_of(merged) if streamed else json.loads(merged)
    prompts = json.loads(recorded["prefill"])
    for each in answers if isinstance(answers, list) else [answers]:
        meta, of_prompt = each["meta_info"], prompts[each.get("index", 0)] if batch else prompts
        if batch and not streamed:
            of_prompt = prompts[answers.index(each)]
        for key in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
            assert meta[key] == of_prompt["meta_info"][key]
            assert len(meta[key]) == meta["prompt_tokens"]
        assert None not in meta["output_token_ids_logprobs"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    assert merger.problem is None


def test_merge_of_a_recorded_response_without_prompt() -> None:
    """Without ``logprob_start_len`` there is nothing of the prompt, and nothing changes."""
    recorded = json.loads((RECORDED / "whole-answer-only.json").read_text())
    found = read_prefill(recorded["prefill"].encode())
    assert found is not None

    assert json.loads(fed(WholeMerger(found), recorded["decode"].encode())) == json.loads(recorded["decode"])
