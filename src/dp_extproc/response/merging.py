"""Merges what only the prefill leg's response has into the client's response, which is decode's.

Rules that live here and nowhere else:

1. Values are never decoded and encoded again, only joined, so numbers stay as the engine wrote them.
2. A response is held for no longer than until its line, or the whole of it, is complete. Text that is no JSON passes:
   the client cannot read it either.
3. A response is complete or an error. What cannot be merged sets :attr:`Merger.problem`, and nothing follows.
"""

import re
from typing import Any, Final, Protocol

import msgspec
from msgspec import Raw

MOST_BYTES: Final = 64 << 20
"""Bytes of a response, or of one event, that are held. A prompt of 100000 tokens with 5 alternatives each is 20 MB."""

Members = dict[str, Raw]
read_object: Final = msgspec.json.Decoder(Members).decode
read_list: Final = msgspec.json.Decoder(list[Raw]).decode
read_index: Final = msgspec.json.Decoder(int).decode
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of text that is no JSON, or other JSON than what is expected."""


class MergeError(ValueError):
    """The responses of the two legs do not fit together; the message has the reason."""


class LegText:
    """The text of the prefill leg's response. Nothing of it is kept if it is larger than what can be merged."""

    __slots__ = ("_chunks", "_size", "is_complete")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self.is_complete = False
        """Whether no more of the text will come."""

    def take(self, chunk: bytes, *, end_of_stream: bool) -> None:
        """Take in a piece of the text."""
        self._size += len(chunk)
        if self._size > MOST_BYTES:
            self._chunks.clear()
        else:
            self._chunks.append(chunk)
        self.is_complete = self.is_complete or end_of_stream

    def read(self) -> bytes:
        """Give the whole text; nothing if it is not complete, or too large."""
        return b"".join(self._chunks) if self.is_complete and self._size <= MOST_BYTES else b""


class Graft(Protocol):
    """What the prefill leg's response has, and where it belongs in the client's."""

    def whole(self, response: bytes) -> bytes:
        """Merge a response that is one JSON text.

        Raises:
            MergeError: It does not fit the prefill leg's response.
            msgspec.DecodeError: It is not what the engine answers on this path.
        """
        ...

    def event(self, event: Members) -> bytes | None:
        """Merge an event of a stream; None for one that stays as it is. It raises what :meth:`whole` raises."""
        ...


class Merger(Protocol):
    """Takes bytes of a response, and gives bytes of the merged response."""

    problem: str | None
    """The reason why the rest of the response could not be merged, and is not given."""

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        """Take in a piece of the response, and give what can be passed on."""
        ...


class NoMerger:
    """Stands for a merger where there is nothing to merge with."""

    def __init__(self, problem: str) -> None:
        self.problem: str | None = problem

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:  # noqa: ARG002 - nothing is given
        return b""


class WholeMerger:
    """Merges a response that is one JSON text."""

    __slots__ = ("_graft", "_held", "_most", "_size", "problem")

    def __init__(self, graft: Graft, most: int = MOST_BYTES) -> None:
        self._graft = graft
        self._most = most
        self._held: list[bytes] = []
        self._size = 0
        self.problem: str | None = None

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        if self.problem is not None:
            return b""
        self._held.append(data)
        self._size += len(data)
        if self._size > self._most:
            self.problem = "the response is too large"
        if self.problem is None and not end_of_stream:
            return b""
        response = b"".join(self._held)
        self._held = []
        return b"" if self.problem is not None else self._merge(response)

    def _merge(self, response: bytes) -> bytes:
        try:
            return self._graft.whole(response)
        except UNREADABLE:
            return response
        except MergeError as error:
            self.problem = str(error)
            return b""


_MAY_MERGE: Final = re.compile(rb"^data:[ \t\r\f\v]*\{", re.MULTILINE)
"""The start of a line that may have something to merge: JSON behind the name of the field."""


class StreamMerger:
    """Merges a response that is a stream of server-sent events, line by line."""

    __slots__ = ("_graft", "_line", "_most", "_size", "problem")

    def __init__(self, graft: Graft, most: int = MOST_BYTES) -> None:
        self._graft = graft
        self._most = most
        self._line: list[bytes] = []
        self._size = 0
        self.problem: str | None = None

    def feed(self, data: bytes, *, end_of_stream: bool) -> bytes:
        if self.problem is not None:
            return b""
        merged: list[bytes] = []
        try:
            self._feed(data, merged, end_of_stream=end_of_stream)
        except MergeError as error:
            self.problem = str(error)
            self._take()
        return b"".join(merged)

    def _feed(self, data: bytes, merged: list[bytes], *, end_of_stream: bool) -> None:
        rest, line_feed, more = data.partition(b"\n")
        if line_feed:
            merged.append(self._merge(self._take() + rest) + b"\n")
            # Line by line, a MiB of empty lines would block the event loop for most of a second.
            at = 0
            for found in _MAY_MERGE.finditer(more):
                end = more.find(b"\n", found.start())
                if end < 0:
                    break
                merged += (more[at : found.start()], self._merge(more[found.start() : end]), b"\n")
                at = end + 1
            passed = more.rfind(b"\n") + 1
            merged.append(more[at:passed])
            rest = more[passed:]
        if end_of_stream:
            merged.append(self._merge(self._take() + rest))
        elif rest:
            self._line.append(rest)
            self._size += len(rest)
            if self._size > self._most:
                raise MergeError("an event of the response is too large")

    def _take(self) -> bytes:
        held = b"".join(self._line)
        self._line, self._size = [], 0
        return held

    def _merge(self, line: bytes) -> bytes:
        name, colon, data = line.partition(b":")
        if name != b"data" or not data.lstrip().startswith(b"{"):  # [DONE], the empty line behind each event
            return line
        try:
            merged = self._graft.event(read_object(data))
        except UNREADABLE:
            return line
        return line if merged is None else name + colon + b" " + merged + (b"\r" if data.endswith(b"\r") else b"")


def write_object(members: dict[str, Any]) -> bytes:
    """Write an object, whose raw members stay as they are."""
    return msgspec.json.encode(members)
