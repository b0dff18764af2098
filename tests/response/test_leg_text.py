"""What is kept of the prefill leg's response."""

import pytest

from dp_extproc.response.merging import LegText


def test_leg_text_is_whole_when_its_last_piece_has_arrived() -> None:
    """The text does not depend on how the network cuts it."""
    text = LegText()
    text.take(b"one, ", end_of_stream=False)
    text.take(b"two", end_of_stream=True)
    assert text.read() == b"one, two"


def test_leg_text_is_empty_while_it_is_not_complete() -> None:
    """A part of it cannot be parsed."""
    text = LegText()
    text.take(b"one, ", end_of_stream=False)
    assert text.read() == b""


def test_leg_text_keeps_nothing_when_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is too long is of no use, neither whole nor in part."""
    monkeypatch.setattr("dp_extproc.response.merging.MOST_BYTES", 10)
    text = LegText()
    text.take(b"x" * 8, end_of_stream=False)
    text.take(b"x" * 8, end_of_stream=False)
    assert text._chunks == []
    text.take(b"", end_of_stream=True)
    assert text.read() == b""
