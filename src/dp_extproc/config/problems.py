"""Problems of a configuration file: place, and what to write instead."""

from collections.abc import Sequence
from dataclasses import dataclass

Key = tuple[int | str, ...]
"""Path from the root of the file: names of keys, and indexes of list items."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the file."""

    line: int | None
    """Counted from 1; None if the place has no line."""
    key: str
    """Path of the key, such as ``pools[0].prefill.endpoints[1].url``."""
    message: str
    """What is wrong and what to write instead."""

    def __str__(self) -> str:
        place = ", ".join(part for part in (f"line {self.line}" if self.line else "", self.key) if part)
        return f"{place}: {self.message}" if place else self.message


class ConfigError(Exception):
    """The file cannot be used. ``problems`` holds every problem of it."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join([f"{source}: {len(self.problems)} problem(s)", *(f"  {p}" for p in self.problems)]))


def spell(key: Key) -> str:
    """Write a path as messages show it: ``pools[0].models``."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
