"""Puts the request ids of the client into a response, in place of those of the decode leg.

The ids of legs are random, so their bytes stand for nothing else, wherever they are: in members, in error texts, in
events of streams.
"""

import re
from typing import Final

from msgspec import Struct

_MOST_DIGITS: Final = 6
"""Digits of the largest index in an id of a batch."""


class Renames(Struct, frozen=True):
    """The ids of a request, before and after."""

    request_id: str
    """The id of the decode leg, or the start of the ids of a batch, behind which ``-INDEX.`` stands."""
    client_ids: tuple[bytes, ...]
    """The client's id of each prompt, as it stands within quotes in JSON."""
    is_batch: bool


class Renamer:
    """Renames the ids in one response, however it is cut into pieces."""

    __slots__ = ("_client_ids", "_held", "_id", "_is_batch", "_longest", "_pattern")

    def __init__(self, renames: Renames) -> None:
        self._client_ids = renames.client_ids
        self._is_batch = renames.is_batch
        self._id = renames.request_id.encode()
        end = rb"-(\d{1,%d})\." % _MOST_DIGITS if renames.is_batch else b""
        self._pattern = re.compile(re.escape(self._id) + end)
        self._longest = len(self._id) + (_MOST_DIGITS + 2 if renames.is_batch else 0)
        self._held = b""

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        """Take in a piece of the response, and give what can be passed on: all but the start of an id at its end."""
        text = self._pattern.sub(self._rename, self._held + data)
        at = len(text) if end_of_stream else self._begun(text)
        self._held = text[at:]
        return text[:at]

    def _rename(self, found: re.Match[bytes]) -> bytes:
        index = int(found[1]) if self._is_batch else 0
        return self._client_ids[index] if index < len(self._client_ids) else found[0]

    def _begun(self, text: bytes) -> int:
        """Return where an id begins that the text does not have to its end."""
        first = self._id[:1]
        at = text.find(first, max(0, len(text) - self._longest + 1))
        while at >= 0 and not self._may_become_id(text[at:]):
            at = text.find(first, at + 1)
        return len(text) if at < 0 else at

    def _may_become_id(self, start: bytes) -> bool:
        rest = start[len(self._id) :]
        if not rest and start != self._id:
            return self._id.startswith(start)
        has_id = self._is_batch and start.startswith(self._id)
        return has_id and re.fullmatch(rb"(-\d{0,%d})?" % _MOST_DIGITS, rest) is not None
