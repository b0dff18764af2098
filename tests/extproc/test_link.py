"""What is kept of the prefill leg's answer."""

import asyncio

import pytest

from dp_extproc.extproc.link import PrefillText


def wait(text: PrefillText) -> bytes:
    return asyncio.run(text.wait())


def test_the_text_is_whole_if_it_is_wanted() -> None:
    """However it was cut."""
    text = PrefillText(is_wanted=True)
    text.take(b"one, ", end_of_stream=False)
    text.take(b"two", end_of_stream=True)
    assert wait(text) == b"one, two"


def test_nothing_is_kept_of_a_text_that_nobody_wants() -> None:
    """A leg that goes on for ever takes no memory; streams of legs are sent here for their first event."""
    text = PrefillText(is_wanted=False)
    for _ in range(3):
        text.take(b"x" * 1000, end_of_stream=False)
    assert text._chunks == []
    text.close()
    assert wait(text) == b""


def test_nothing_is_kept_of_a_text_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of no use, neither whole nor in part."""
    monkeypatch.setattr("dp_extproc.extproc.link.MOST_BYTES", 10)
    text = PrefillText(is_wanted=True)
    text.take(b"x" * 8, end_of_stream=False)
    text.take(b"x" * 8, end_of_stream=False)
    assert text._chunks == []
    text.take(b"", end_of_stream=True)
    assert wait(text) == b""
