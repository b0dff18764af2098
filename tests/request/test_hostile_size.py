"""Bodies that are made to cost much more than their size are refused, or cost little."""

import json
import tracemalloc

import pytest

from dp_extproc.request.body import MOST_MARKS, InferenceRequest, read_body
from dp_extproc.request.members import MOST_MEMBERS
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

_MARKS = 200_000
_BYTES_OF_A_MARK = 300
"""Bounds the memory of one mark: a body with as many as are allowed takes 600 MB for a moment."""
_BYTES_OF_A_BYTE = 12


def _peak_of(api: Api, text: bytes) -> int:
    """Return the bytes of memory that reading a body takes at most."""
    tracemalloc.start()
    try:
        read_body(api, text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_too_many_members_are_refused() -> None:
    """Each one would be searched for in the text; no request has so many."""
    members = b",".join(b'"f%d":1' % number for number in range(MOST_MEMBERS + 1))
    refusal = read_body(Api.GENERATE, b'{"text":"a",' + members + b"}")
    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (400, Reason.UNSUPPORTED_VALUE)

    members = b",".join(b'"f%d":1' % number for number in range(MOST_MEMBERS - 1))
    assert isinstance(read_body(Api.GENERATE, b'{"text":"a",' + members + b"}"), InferenceRequest)


@pytest.mark.parametrize("thing", [b"{},", b"[],", b'"",'], ids=["objects", "lists", "strings"])
def test_too_many_marks_are_refused(thing: bytes) -> None:
    """Millions of empty objects would take gigabytes, and seconds in which other requests wait."""
    refusal = read_body(Api.CHAT, b'{"messages":[' + thing * MOST_MARKS + b"0]}")
    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (400, Reason.UNSUPPORTED_VALUE)


def test_long_prompt_may_quote_json() -> None:
    """Millions of tokens of JSON in a prompt are no attack."""
    quoted = json.dumps([{"name": "value", "number": 17}] * 70_000)
    assert len(quoted) > 2_000_000
    body = json.dumps({"messages": [{"role": "user", "content": quoted}]}).encode()
    assert isinstance(read_body(Api.CHAT, body), InferenceRequest)


@pytest.mark.parametrize(
    ("api", "begin", "thing", "marks"),
    [
        (Api.CHAT, b'{"messages":[', b"{},", 1),
        (Api.CHAT, b'{"messages":[{"content":5},', b"{},", 1),
        (Api.CHAT, b'{"messages":[{"content":5},', b'{"aa":""},', 5),
        (Api.CHAT, b'{"messages":[{"content":5},', b'{"a":[]},', 4),
        (Api.MESSAGES, b'{"system":"s","messages":[{"content":[', b"{},", 1),
        (Api.RESPONSES, b'{"input":[', b"{},", 1),
        (Api.COMPLETIONS, b'{"prompt":[', b"[],", 1),
        (Api.COMPLETIONS, b'{"prompt":[', b'"ab",', 2),
        (Api.GENERATE, b'{"input_embeds":[', b"[],", 1),
    ],
)
def test_body_costs_little_memory(api: Api, begin: bytes, thing: bytes, marks: int) -> None:
    """However the marks are used, each costs no more than a small object, also in a body that is refused."""
    end = b"0]}]}" if begin.count(b"[") > begin.count(b"]") + 1 else b"0]}"
    text = begin + thing * (_MARKS // marks) + end.replace(b"0", thing[:-1], 1)
    json.loads(text)
    assert _peak_of(api, text) < _BYTES_OF_A_MARK * _MARKS


@pytest.mark.parametrize(
    "body",
    [b'{"input_ids":[%s0]}' % (b"0," * 500_000), b'{"input_ids":[%s0]}' % (b"99999999," * 100_000),
     b'{"input_embeds":[%s]}' % b",".join([b"[%s0]" % (b"0," * 4095)] * 100)],
    ids=["small-ids", "large-ids", "embeddings"],
)  # fmt: skip
def test_numbers_cost_little_memory(body: bytes) -> None:
    """Numbers have no marks, and are not limited."""
    request = read_body(Api.GENERATE, body)
    assert isinstance(request, InferenceRequest)
    assert request.prompt.tokens in {500_001, 100_001, 100}
    assert _peak_of(Api.GENERATE, body) < _BYTES_OF_A_BYTE * len(body)
