"""Reads ``/v1/models`` of an engine: a card for each of its models, and one for each of its adapters (LoRA)."""

from typing import Final

from msgspec import Raw, Struct

from dp_extproc.engines.model import ModelCard
from dp_extproc.engines.pages import EngineHttp, ReaderError, read_json

MODELS_PAGE: Final = "/v1/models"
_MOST_CARDS: Final = 2000
"""Bound for the cards that are kept of an engine. SGLang loads adapters on demand, and lists all of them."""
_LONGEST_CARD: Final = 4096
"""Bound for the bytes of a card that is kept. Those of SGLang have some 200, those of vLLM 500."""
_MOST_BRACKETS: Final = 64
"""Bound for the opening brackets of a card that is kept, and so for its depth. Those of vLLM have 3."""
_LONGEST_NAME: Final = 512
"""Bound for the characters of a name."""


class _Page(Struct):
    data: list[Raw]


class _Card(Struct):
    id: str
    parent: str | None = None


def read_cards(page: bytes, of: str) -> tuple[ModelCard, ...]:
    """Read the body of ``GET /v1/models``, or raise :class:`dp_extproc.engines.pages.ReaderError`.

    *of* is the kind of engine that prints such pages.
    """
    found: list[ModelCard] = []
    for raw in read_json(page, _Page, MODELS_PAGE, of=of).data[:_MOST_CARDS]:
        members = bytes(raw)
        if len(members) > _LONGEST_CARD or members.count(b"[") + members.count(b"{") > _MOST_BRACKETS:
            continue
        card = read_json(members, _Card, MODELS_PAGE, of=of)
        if card.id and len(card.id) <= _LONGEST_NAME:
            found.append(ModelCard(card.id, card.parent or None, members))
    return tuple(found)


async def listed_models(http: EngineHttp, of: str) -> tuple[ModelCard, ...]:
    """Get the cards of an engine; none if it does not list its models."""
    try:
        return read_cards(await http.get(MODELS_PAGE), of)
    except ReaderError:
        return ()  # they only describe models, which are configured
