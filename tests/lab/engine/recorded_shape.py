"""Reduce a recorded answer to what is compared: its members and their types, not numbers and texts."""

import json
import re
from itertools import groupby
from typing import Any

LONG = "LONG"
"""In a recorded body: a text of 3000 tokens, more than the server's context; in the real one a token was a byte."""


def shape(value: Any) -> Any:
    """Keep names and types; of equal neighbours in a list one."""
    if isinstance(value, dict):
        # without a hit in the prefix cache there are no details of it
        return {key: "object or null" if key == "cached_tokens_details" else shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [each for each, _ in groupby(map(shape, value))]
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "bool"
    return "number" if isinstance(value, int | float) else "text"


def events_of(text: str) -> list[Any]:
    """Read the events of a stream that came to its end, without the ``[DONE]``."""
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(each) for each in events]


def comparable(error: str) -> str:
    """Remove from an error what no two engines share: ids, the length of a prompt, and its place in the code.

    A prompt has other tokens here, see the text model in docs/engine.md.
    """
    error = re.sub(r'\\n\\n  (File|  POST).*?(?=",")', "", error)
    error = re.sub(r"(rid=')\w+'", r"\1...'", error)
    return re.sub(r"The input \(\d+ tokens\)", "The input (... tokens)", error)
