"""Streams that begin with an error, and streams that begin with a response."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.response.first_event import MOST_BYTES, EngineError, FirstEventReader

CHUNK = 'data: {"id":"1","choices":[{"delta":{"role":"assistant"}}]}\n\n'
OPENAI = 'data: {"error":{"object":"error","message":"Decode transfer failed","type":"X","param":null,"code":500}}\n\n'
DONE = "data: [DONE]\n\n"
STARTED = 'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n'
CREATED = 'event: response.created\ndata: {"type":"response.created","response":{}}\n\n'


def read(text: str, *, size: int | None = None) -> FirstEventReader:
    """Feed a whole stream, in pieces of *size* bytes."""
    data = text.encode()
    size = size or len(data)
    first = FirstEventReader()
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
    "after-many-comments": (": keep-alive\n\n" * 1000 + OPENAI, 500, "Decode transfer failed"),
    "after-empty-lines": ("\n\r\n\r\r" + OPENAI, 500, "Decode transfer failed"),
    "carriage-returns": (OPENAI.replace("\n", "\r\n"), 500, "Decode transfer failed"),
    "carriage-returns-alone": (OPENAI.replace("\n", "\r"), 500, "Decode transfer failed"),
    "byte-order-mark": ("\ufeff" + OPENAI, 500, "Decode transfer failed"),
    "several-lines-of-data": ('data: {"error":\ndata: {"code": 503}}\n\n', 503, "503"),
    "no-empty-line-at-the-end": (OPENAI.rstrip("\n"), 500, "Decode transfer failed"),
    "odd-code": ('data: {"error":{"message":"x","code":"context_length_exceeded"}}\n\n', 500, "x"),
}


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize(("text", "status", "words"), ERRORS.values(), ids=ERRORS)
def test_first_event_reads_the_error_of_each_api(text: str, status: int, words: str, size: int | None) -> None:
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
def test_first_event_has_no_error_in_other_events(text: str, size: int | None) -> None:
    """What cannot be read is not ours to judge."""
    first = read(text, size=size)
    assert first.is_known
    assert first.error is None


def test_first_event_is_not_known_before_it_is_complete() -> None:
    """Half an event, or a preamble, decides nothing."""
    first = FirstEventReader()
    first.feed(STARTED.encode() + OPENAI[:-1].encode(), end_of_stream=False)
    assert not first.is_known
    first.feed(b"\n", end_of_stream=False)
    assert first.error is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(": keep-alive\n\n", True), (":\r", True), ("\ufeff: x\n", True), (": x", False), ("event: ping\n\n", False)],
)
def test_comments_are_seen_once_their_line_is_complete(text: str, expected: bool) -> None:
    """They are no event, so nothing else is known by them."""
    first = FirstEventReader()
    first.feed(text.encode(), end_of_stream=False)
    assert (first.has_comment, first.is_known) == (expected, False)


ENDLESS = {
    "comments": b": x\n\n",
    "empty lines": b"\n",
    "carriage returns": b"\r",
    "both": b"\r\n",
    "a line": b"x",
    "a line of data": b"data: {",
    "lines of data": b"data: 1\n",
    "empty data": b"data:\n\n",
    "pings": b'data: {"type":"ping"}\n\n',
    "preambles": STARTED.encode(),
    "arrays": b"[",
}
"""What a stream may go on with for ever."""
SIZES = [1, 7, 62_000, 1 << 20]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("what", ENDLESS.values(), ids=ENDLESS)
def test_stream_counts_as_good_after_64_kib(what: bytes, size: int) -> None:
    """Nothing can hold an answer for ever, and what comes later is not looked at, not even an error."""
    begun = (what * MOST_BYTES)[: MOST_BYTES - 1]
    first = FirstEventReader()
    for piece in pieces(begun, size):
        first.feed(piece, end_of_stream=False)
    assert not first.is_known
    first.feed(b"\n" + OPENAI.encode(), end_of_stream=False)
    assert first.is_known
    assert first.error is None


def test_error_is_found_up_to_the_limit() -> None:
    """It counts what is looked at, not what comes in a chunk."""
    error = OPENAI.encode()
    for excess, is_found in ((0, True), (1, False)):
        before = b":" * (MOST_BYTES - len(error) - 2 + excess) + b"\n\n"
        first = FirstEventReader()
        first.feed(before + error + b": x\n\n" * 9, end_of_stream=False)
        assert first.is_known
        assert (first.error is not None) is is_found


NESTING = {
    "openai": '{"error":{"code":500,"x":%s}}',
    "generate": '{"meta_info":{"finish_reason":{"type":"abort","status_code":500,"message":%s}}}',
    "generate-batch": '[{"meta_info":{"finish_reason":{"type":"abort","status_code":500,"message":%s}}}]',
    "responses": '{"type":"response.failed","response":{"error":%s}}',
}


@pytest.mark.parametrize("text", NESTING.values(), ids=NESTING)
def test_reader_survives_any_depth_of_an_error(text: str) -> None:
    """What cannot be read, or written anew, is an answer."""
    for depth in (*range(300, 1050), 20_000):
        first = FirstEventReader()
        first.feed(f"data: {text % ('[' * depth + ']' * depth)}\n\n".encode(), end_of_stream=False)
        assert first.is_known


_SPLINTERS = [
    b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b":", b": x", b"data", b"data:", b"data: ", b"event: error", BOM_UTF8,
    b"{", b"}", b"3", b'"', b'{"type":"ping"}', b'data: {"type":"ping"}\n\n', b'data: {"type":"ping"}\r\r',
    b'{"error":{"code":500}}', b'data: {"error":{"code":400}}\n\n', b'data: {"error":{"code":503}}\r\n\r\n', b"[DONE]",
]  # fmt: skip


@given(st.lists(st.sampled_from(_SPLINTERS) | st.binary(max_size=5), max_size=30), st.data())
def test_result_does_not_depend_on_how_a_stream_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    """Neither what is known in the end nor from which byte on."""
    stream = b"".join(parts)
    most = data.draw(st.integers(1, len(stream) + 2))
    cuts = data.draw(st.lists(st.integers(0, len(stream))).map(sorted))
    first = FirstEventReader(most)
    for start, end in pairwise([0, *cuts]):
        first.feed(stream[start:end], end_of_stream=False)
        assert _result(first) == _result(_whole(stream[:end], most, end_of_stream=False))
    first.feed(stream[cuts[-1] if cuts else 0 :], end_of_stream=True)
    assert _result(first) == _result(_whole(stream, most, end_of_stream=True))
    assert first.is_known


def _whole(stream: bytes, most: int, *, end_of_stream: bool) -> FirstEventReader:
    first = FirstEventReader(most)
    first.feed(stream, end_of_stream=end_of_stream)
    return first


def _result(first: FirstEventReader) -> tuple[bool, EngineError | None]:
    return first.is_known, first.error


class Counted(bytes):
    """Bytes that count how many of them are touched, through all that is made of them."""

    touched = 0

    def _touch(self, made: bytes) -> "Counted":
        Counted.touched += len(self)
        return Counted(made)

    def __add__(self, other: Any) -> "Counted":
        return self._touch(super().__add__(other))

    def __radd__(self, other: bytes) -> "Counted":
        return Counted(other)._touch(other + bytes(self))

    def __getitem__(self, at: Any) -> Any:
        made = super().__getitem__(at)
        if isinstance(made, int):
            return made
        Counted.touched += len(made)
        return Counted(made)

    def replace(self, old: Any, new: Any, count: SupportsIndex = -1) -> "Counted":
        return self._touch(super().replace(old, new, count))

    def partition(self, sep: Any) -> "tuple[Counted, Counted, Counted]":
        before, middle, after = super().partition(sep)
        return self._touch(before), Counted(middle), Counted(after)

    def find(self, *where: Any) -> int:
        Counted.touched += len(self)
        return super().find(*where)

    def split(self, *by: Any) -> "list[Counted]":  # type: ignore[override]
        Counted.touched += len(self)
        return [Counted(each) for each in super().split(*by)]

    def splitlines(self, keepends: bool = False) -> "list[Counted]":  # type: ignore[override]
        Counted.touched += len(self)
        return [Counted(each) for each in super().splitlines(keepends)]

    def strip(self, what: Any = None) -> "Counted":
        return self._touch(super().strip(what))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("what", ENDLESS.values(), ids=ENDLESS)
def test_reader_takes_linear_time(what: bytes, size: int) -> None:
    """However many chunks and events there are, and however many bytes come behind the limit."""
    endless = what * (3 * MOST_BYTES // len(what))
    first = FirstEventReader()
    Counted.touched = 0
    for piece in pieces(endless, size):
        first.feed(Counted(piece), end_of_stream=False)
    assert first.is_known
    assert 0 < Counted.touched < 5 * MOST_BYTES


def pieces(stream: bytes, size: int) -> Iterator[bytes]:
    return (stream[start : start + size] for start in range(0, len(stream), size))


@given(st.lists(st.binary(max_size=50)))
def test_reader_survives_any_bytes(chunks: list[bytes]) -> None:
    """Whatever comes, the end of the stream settles it."""
    first = FirstEventReader()
    for chunk in chunks:
        first.feed(chunk, end_of_stream=False)
    first.feed(b"", end_of_stream=True)
    assert first.is_known
