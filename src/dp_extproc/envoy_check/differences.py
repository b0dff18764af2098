"""Compares two messages field by field."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from betterproto2 import Message
from msgspec import Struct

from dp_extproc.envoy_check.messages import UnreadableError
from dp_extproc.envoy_config.yaml_text import plain

ABSENT: Final = "not set"
_REDACTED: Final = frozenset({"[redacted]", "W3JlZGFjdGVkXQ=="})
"""What Envoy's admin page has in place of a secret, as text and in base64."""
_LONGEST: Final = 80
"""Characters of a value in a text."""


class Difference(Struct, frozen=True):
    """A field that is not as printed."""

    path: tuple[str, ...]
    printed: Any
    found: Any

    @property
    def is_order(self) -> bool:
        """Whether only the order of named parts differs."""
        return self.path[-1:] == (_ORDER,)

    @property
    def where(self) -> str:
        """The path as it is written in Envoy's documentation, with the names of parts in brackets."""
        return "".join(each if each.startswith("[") else f".{each}" for each in self.path).removeprefix(".")


_ORDER: Final = "[order]"


def differences(printed: Message, found: Message) -> Iterator[Difference]:
    """Yield what differs. Parts with names are compared with those of the same name, wherever they stand.

    Raises:
        UnreadableError: A number exceeds its field, so that what it is in cannot be read.
    """
    if printed == found:  # which is fast, and mostly the case
        return
    try:
        values = plain(found)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds for malformed data
        raise UnreadableError(f"has a value that exceeds its field: {error}") from None
    yield from _compare((), plain(printed), values)


def shown(value: Any) -> str:
    """Return a value as a short text."""
    if isinstance(value, (Mapping, list)):
        return "something else" if value else "empty"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _compare(path: tuple[str, ...], printed: Any, found: Any) -> Iterator[Difference]:
    if printed == found or (isinstance(found, str) and found in _REDACTED):
        return
    if isinstance(printed, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys((*printed, *found)):
            yield from _compare((*path, key), printed.get(key, ABSENT), found.get(key, ABSENT))
    elif isinstance(printed, list) and isinstance(found, list):
        yield from _compare_lists(path, printed, found)
    else:
        yield Difference(path, printed, found)


def _compare_lists(path: tuple[str, ...], printed: list[Any], found: list[Any]) -> Iterator[Difference]:
    names, others = _names(printed), _names(found)
    if names is None or others is None:
        if len(printed) != len(found):
            yield Difference(path, printed, found)
            return
        for number, pair in enumerate(zip(printed, found, strict=True)):
            yield from _compare((*path, f"[{number}]"), *pair)
        return
    for name in dict.fromkeys((*names, *others)):
        yield from _compare((*path, f"[{name}]"), names.get(name, ABSENT), others.get(name, ABSENT))
    common = [name for name in others if name in names]
    if common != [name for name in names if name in others]:
        yield Difference((*path, _ORDER), ", ".join(names), ", ".join(others))


def _names(items: list[Any]) -> dict[str, Any] | None:
    """Return the items by name; None if they have none, or not each its own."""
    named = {item["name"]: item for item in items if isinstance(item, Mapping) and isinstance(item.get("name"), str)}
    return named if len(named) == len(items) else None
