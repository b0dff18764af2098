"""The prompts of a request that is not a chat."""

from typing import Any

from dp_extproc.engine.api.exchange import wrong_type
from dp_extproc.engine.text import ids_prompt, text_prompt


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


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)
