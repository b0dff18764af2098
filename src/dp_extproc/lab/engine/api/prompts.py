"""Read the prompts of a request that is not a chat."""

from collections.abc import Iterable
from typing import Any, Final

from dp_extproc.lab.engine.api.exchange import wrong_type
from dp_extproc.lab.engine.text import ids_prompt, text_prompt

_IDS: Final = range(-(1 << 63), 1 << 63)
"""Numbers that can reach a scheduler."""


def read_texts(name: str, value: Any) -> tuple[list[bytes], bool]:
    """Read a text, token ids, or a list of either.

    Returns:
        The tokens of each prompt, and whether it is a batch.

    Raises:
        InvalidBodyError: It is neither.
    """
    if isinstance(value, str):
        return [text_prompt(value)], False
    if not isinstance(value, list) or not value:
        raise wrong_type(name, value, "string")
    if _are_ids(value):
        return [ids_prompt(value)], False
    found = []
    for each in value:
        if isinstance(each, str):
            found.append(text_prompt(each))
        elif isinstance(each, list) and each and _are_ids(each):
            found.append(ids_prompt(each))
        else:
            raise wrong_type(name, each, "string")
    return found, True


def unknown_id(value: Any, vocabulary_size: int) -> int | None:
    """Find a token id in a prompt, or a list of them, that the vocabulary lacks; no release of SGLang checks it."""
    if not isinstance(value, list):
        return None
    lists: Iterable[list[Any]] = (each for each in (value, *value) if isinstance(each, list))
    return next(
        (id_ for ids in lists if _are_ids(ids) for id_ in ids if id_ in _IDS and not 0 <= id_ < vocabulary_size), None
    )


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)
