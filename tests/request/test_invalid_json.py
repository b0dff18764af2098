"""A body that is not JSON is refused with what is wrong, at which byte, and what to send."""

import pytest

from dp_extproc.request.body import read_body
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

OBJECT = '{"prompt":"a"}'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(OBJECT.encode("utf-8-sig"), ("byte order mark", "byte 0", "UTF-8 without it"), id="mark"),
        pytest.param(OBJECT.encode("utf-16"), ("UTF-16", "byte 0", "send UTF-8"), id="utf-16"),
        pytest.param(OBJECT.encode("utf-16-le"), ("UTF-16", "byte 1", "send UTF-8"), id="utf-16 without a mark"),
        pytest.param(OBJECT.encode("utf-16-be"), ("UTF-16", "byte 0", "send UTF-8"), id="utf-16 in big endian"),
        pytest.param(OBJECT.encode("utf-32"), ("UTF-32", "byte 0", "send UTF-8"), id="utf-32"),
        pytest.param(rb'{"prompt":"a\ud800b"}', (r"surrogate \ud800", "byte 12"), id="first half"),
        pytest.param(rb'{"prompt":"\\\udC00"}', (r"surrogate \udC00", "byte 13"), id="second half"),
        pytest.param(rb'{"prompt":"\ud83d\ude00 \ude00"}', (r"surrogate \ude00", "byte 24"), id="behind a pair"),
        pytest.param(b'{"prompt":"\xed\xa0\x80"}', ("surrogate", "byte 11"), id="as a character"),
        pytest.param(b'{"prompt":"\xff"}', ("not valid UTF-8", "byte 11"), id="no utf-8"),
        pytest.param(b'{"prompt":"a', ("ends too early", "12 bytes"), id="cut off"),
        pytest.param(b'{"prompt":NaN}', ("invalid character 'N'", "byte 10"), id="no number"),
        pytest.param(b'{"prompt":"a",}', ("trailing comma", "byte 14"), id="comma"),
        pytest.param(rb'{"prompt":"\\ud800', ("ends too early",), id="no escape"),
    ],
)
def test_body_that_is_no_json_is_explained(body: bytes, words: tuple[str, ...]) -> None:
    """The words of a parser alone, such as `Input data was truncated` for half a pair, help no user."""
    refusal = read_body(Api.COMPLETIONS, body)

    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.INVALID_JSON
    assert [word for word in words if word not in refusal.message] == []
    assert "JSON is malformed" not in refusal.message


def test_search_for_half_a_pair_takes_linear_time() -> None:
    """A megabyte of backslashes is read once."""
    refusal = read_body(Api.COMPLETIONS, b'{"prompt":"' + b"\\" * (4 << 20) + b'ud800"')

    assert isinstance(refusal, Rejection)
