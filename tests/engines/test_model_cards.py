"""The cards on ``/v1/models`` of an engine are read, whatever the page has."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model_cards import listed_models, read_cards
from dp_extproc.engines.pages import ReaderError

CARD = b'{"id":"qwen","object":"model","max_model_len":4096}'
ADAPTER = b'{"id":"a","root":"/a","parent":"qwen"}'


def test_cards_of_models_and_adapters_are_read() -> None:
    """Their members stay as the engine wrote them."""
    cards = read_cards(b'{"data":[%b,%b]}' % (CARD, ADAPTER), "SGLang")

    assert [(card.name, card.parent, card.members) for card in cards] == [("qwen", None, CARD), ("a", "qwen", ADAPTER)]


@pytest.mark.parametrize(
    "card",
    [
        pytest.param(b'{"id":"%b"}' % (b"x" * 5000), id="long"),
        pytest.param(b'{"id":"%b"}' % (b"x" * 600), id="long name"),
        pytest.param(b'{"id":"x","deep":%b1%b}' % (b"[" * 500, b"]" * 500), id="deep"),
        pytest.param(b'{"id":""}', id="no name"),
    ],
)
def test_card_beyond_all_measure_is_left_out(card: bytes) -> None:
    """Others stay."""
    assert [each.name for each in read_cards(b'{"data":[%b,%b]}' % (card, CARD), "SGLang")] == ["qwen"]


@given(st.binary(max_size=60).map(lambda junk: b'{"data":[%b]}' % junk) | st.binary(max_size=60))
def test_any_other_page_is_refused(page: bytes) -> None:
    """Nothing else is raised."""
    with contextlib.suppress(ReaderError):
        assert read_cards(page, "SGLang") == ()


class _Silent:
    async def get(self, path: str, *, patience: float = 1.0, hint: str = "") -> bytes:
        raise ReaderError(FailureKind.TIMEOUT, f"{path} {patience} {hint}")

    async def post(
        self, path: str, body: bytes, header: tuple[str, str], *, patience: float = 1.0
    ) -> tuple[int, bytes] | None:
        raise NotImplementedError


def test_engine_without_the_page_lists_no_models() -> None:
    """The page only describes models, so the engine counts as well without it."""
    assert asyncio.run(listed_models(_Silent(), "SGLang")) == ()
