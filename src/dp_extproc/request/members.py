"""The members of a JSON object as byte ranges of its text, without serialising anything again.

msgspec validates the whole text and skips values at memory speed, but returns their lengths, not their positions. So
the object is walked once more, member by member: a regular expression reads the key, and the length leads over the
value.
"""

import re
from collections.abc import Collection
from typing import Any, Final

import msgspec

_WHITESPACE: Final = rb"[ \t\n\r]*"
_KEY: Final = _WHITESPACE + rb'"[^"\\]*(?:\\.[^"\\]*)*"' + _WHITESPACE + rb":" + _WHITESPACE
_TO_VALUE: Final = re.compile(_WHITESPACE + rb"([{,}])(?:" + _KEY + rb")?")
"""Matches from the start, or the end of a value, to the start of the next value, or to behind the object."""

MOST_MEMBERS: Final = 4096
"""Bounds the members of one object. Requests have a few dozen; each member costs hundreds of bytes of memory."""


class TooManyMembersError(Exception):
    """An object has more than :data:`MOST_MEMBERS`."""


class _Key:
    """A key that equals no other, so that a dict keeps the repeated keys of an object, in their order."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _MemberReader:
    """Reads the members of an object, and stops if there are too many."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=self._as_key)
        self._left = 0

    def read(self, text: bytes) -> dict[_Key, msgspec.Raw]:
        self._left = MOST_MEMBERS
        return self._decoder.decode(text)

    def _as_key(self, _kind: type, name: Any) -> _Key:
        if not self._left:
            raise TooManyMembersError
        self._left -= 1
        return _Key(name)


_reader: Final = _MemberReader()


class JsonObject:
    """A validated JSON object: its text, and its values by key."""

    __slots__ = ("_last_without", "_members", "text", "values")

    def __init__(self, text: bytes) -> None:
        """Validate.

        Raises:
            msgspec.ValidationError: It is JSON, but not an object.
            msgspec.DecodeError: It is not JSON (the base class of the former).
            UnicodeDecodeError: It is not UTF-8.
            RecursionError: It is nested too deeply.
            TooManyMembersError: It has more members than any request.
        """
        self.text = text
        self._members = _reader.read(text)
        if not text.isascii():
            text.decode()  # values that are skipped are not checked for UTF-8 by msgspec
        self.values: dict[str, msgspec.Raw] = {key.name: raw for key, raw in self._members.items()}
        """The values by key; of a repeated key the last one, which the JSON reader of SGLang takes."""
        self._last_without: tuple[Collection[str], list[memoryview]] | None = None

    def without(self, unwanted: Collection[str]) -> list[memoryview]:
        """Leave out members by key: every occurrence, however the key is escaped.

        Returns:
            Pieces that, joined, are the text behind the opening brace, with the closing brace and every other byte
            unchanged. They are views, so that a body of many megabytes is copied only once.
        """
        if self._last_without is None or self._last_without[0] is not unwanted:
            self._last_without = (unwanted, self._without(unwanted))
        return self._last_without[1]

    def _without(self, unwanted: Collection[str]) -> list[memoryview]:
        text, view = self.text, memoryview(self.text)
        match = _TO_VALUE.match(text)
        assert match is not None  # noqa: S101 - the text has been validated
        position = match.end(1)
        if self.values.keys().isdisjoint(unwanted):
            return [view[position:]]
        pieces: list[memoryview] = []
        run: int | None = None  # the start of the present run of wanted members
        for key, raw in self._members.items():
            begin = position
            match = _TO_VALUE.match(text, match.end() + len(memoryview(raw)))
            assert match is not None  # noqa: S101 - the text has been validated
            position = match.end(1)
            if key.name not in unwanted:
                run = begin if run is None else run
            elif run is not None:
                pieces.append(view[run:begin])
                run = None
        closing = position - 1
        if run is not None:
            pieces.append(view[run:])
        else:
            if pieces:
                pieces[-1] = pieces[-1][:-1]  # without the comma before the dropped members
            pieces.append(view[closing:])
        return pieces

    def is_empty_without(self, unwanted: Collection[str]) -> bool:
        """Return whether no member is left after :meth:`without`."""
        return self.values.keys() <= set(unwanted)
