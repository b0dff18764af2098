"""Streams that begin with an error, told from those that begin with an answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.extproc.first_event import EngineError, FirstEvent

CHUNK = 'data: {"id":"1","choices":[{"delta":{"role":"assistant"}}]}\n\n'
OPENAI = 'data: {"error":{"object":"error","message":"Decode transfer failed","type":"X","param":null,"code":500}}\n\n'
DONE = "data: [DONE]\n\n"
STARTED = 'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n'
CREATED = 'event: response.created\ndata: {"type":"response.created","response":{}}\n\n'


def read(text: str, *, size: int | None = None) -> FirstEvent:
    """Feed a whole stream, in pieces of *size* bytes."""
    data = text.encode()
    size = size or len(data)
    first = FirstEvent()
    for start in range(0, len(data), size):
        first.feed(data[start : start + size], end_of_stream=start + size >= len(data))
    return first


def generate(**reason: object) -> str:
    return f"data: {json.dumps({'text': '', 'meta_info': {'finish_reason': reason}})}\n\n"


ERRORS = {
    "openai": (OPENAI + DONE, 500, "Decode transfer failed"),
    "openai-client-fault": ('data: {"error":{"message":"too long","code":400}}\n\n', 400, "too long"),
    "generate": (generate(type="abort", message="KVTransferError", status_code=503), 503, "KVTransferError"),
    "generate-batch": (f"data: [{generate(type='abort', message='gone', status_code=500)[6:-2]}]\n\n", 500, "gone"),
    "messages": (STARTED + 'event: error\ndata: {"type":"error","error":{"message":"Internal"}}\n\n', 500, "Internal"),
    "responses": (
        CREATED + 'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"message":"bad"}}}\n\n',
        500,
        "bad",
    ),
    "after-a-comment": (": keep-alive\n\n" + OPENAI, 500, "Decode transfer failed"),
    "carriage-returns": (OPENAI.replace("\n", "\r\n"), 500, "Decode transfer failed"),
    "odd-code": ('data: {"error":{"message":"x","code":"context_length_exceeded"}}\n\n', 500, "x"),
}


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize(("text", "status", "words"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_recognised(text: str, status: int, words: str, size: int | None) -> None:
    """However the stream is cut: its status, and a body that a client can read."""
    first = read(text, size=size)
    assert first.is_known
    assert isinstance(first.error, EngineError)
    assert first.error.status == status
    assert words in first.error.body.decode()
    assert "error" in json.loads(first.error.body)


ANSWERS = {
    "openai": CHUNK,
    "generate": generate(type="length", length=1),
    "generate-running": 'data: {"text":"a","meta_info":{"finish_reason":null}}\n\n',
    "aborted-by-the-client": generate(type="abort", message="Abort in waiting queue"),
    "done": DONE,
    "messages": STARTED + 'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n',
    "no-json": "data: {oops\n\n",
    "no-object": "data: 3\n\n",
    "error-is-null": 'data: {"error":null}\n\n',
    "plain-json": '{"text":"not a stream"}',
    "error-later": CHUNK + OPENAI,
}


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_everything_else_is_an_answer(text: str, size: int | None) -> None:
    """What cannot be read is not ours to judge."""
    first = read(text, size=size)
    assert first.is_known
    assert first.error is None


def test_nothing_is_known_before_the_first_event_is_complete() -> None:
    """Half an event, or a preamble, says nothing yet."""
    first = FirstEvent()
    first.feed(STARTED.encode() + OPENAI[:-1].encode(), end_of_stream=False)
    assert not first.is_known
    first.feed(b"\n", end_of_stream=False)
    assert first.error is not None


def test_memory_is_bounded() -> None:
    """An event without end is an answer."""
    first = FirstEvent()
    for _ in range(20):
        first.feed(b"x" * 5000, end_of_stream=False)
    assert first.is_known
    assert len(first._text) < 1 << 17
    assert first.error is None


@given(st.lists(st.binary(max_size=50)))
def test_no_bytes_break_the_reader(chunks: list[bytes]) -> None:
    """Whatever comes, the end of the stream settles it."""
    first = FirstEvent()
    for chunk in chunks:
        first.feed(chunk, end_of_stream=False)
    first.feed(b"", end_of_stream=True)
    assert first.is_known
