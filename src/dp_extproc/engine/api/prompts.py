"""How many tokens each sequence of a request has."""

from typing import Any

from dp_extproc.engine.api.exchange import wrong_type
from dp_extproc.engine.text import text_tokens


def read_texts(name: str, value: Any) -> tuple[list[int], bool]:
    """Read a text, token ids, or a list of either.

    Returns:
        Tokens of each prompt, and whether it is a batch.

    Raises:
        InvalidBodyError: It is neither.
    """
    if isinstance(value, str):
        return [text_tokens(value)], False
    if not isinstance(value, list) or not value:
        raise wrong_type(name, value, "string")
    if _are_ids(value):
        return [len(value)], False
    found = []
    for each in value:
        if isinstance(each, str):
            found.append(text_tokens(each))
        elif isinstance(each, list) and each and _are_ids(each):
            found.append(len(each))
        else:
            raise wrong_type(name, each, "string")
    return found, True


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)
