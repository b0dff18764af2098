"""The first event of a streamed response, which may be an error.

SGLang begins most streams with status 200 and reports a failure in the first event, each API in its own way:
``data: {"error": ...}`` on the OpenAI paths (serving_chat.py), a final state of kind "abort" on /generate
(tokenizer_manager.py), ``event: error`` on /v1/messages, ``response.failed`` on /v1/responses.
"""

from codecs import BOM_UTF8
from typing import Any, Final

import msgspec
from msgspec import Struct

MOST_BYTES: Final = 1 << 16
"""Bytes at the start of a stream that are read: comments, preamble and the event itself.

A stream without an event in so many bytes counts as good, because errors are short. A larger number would let a stream
of comments be held for long, and with it the buffers of Envoy behind it.
"""
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)
"""Errors of events that are no JSON, or nested too deeply to be read or written."""
_PREAMBLE: Final = frozenset({
    "message_start", "ping", "content_block_start",  # Anthropic's
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
})  # fmt: skip
"""Types of events that come before any token was computed."""


class EngineError(Struct, frozen=True):
    """An error in place of the start of a response."""

    status: int
    body: bytes
    """The JSON that the same error has outside of a stream."""


class FirstEventReader:
    """Reads the start of a stream, chunk by chunk; the result does not depend on how the stream is cut.

    Lines end with LF, CR or both, and a byte order mark may come first, as the standard of such streams allows.
    Each byte is read once.
    """

    __slots__ = ("_after_return", "_at_start", "_data", "_line", "_room", "error", "has_comment", "is_known")

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._room = most
        """Bytes that may still be read."""
        self._at_start = True
        """Whether no line is complete yet; a byte order mark may stand before the first one."""
        self._after_return = False
        """Whether the last byte was a CR; an LF that follows belongs to it."""
        self._line: list[bytes] = []
        """The line that is not complete yet, in pieces."""
        self._data: list[bytes] = []
        """Data lines of the event that is not complete yet."""
        self.has_comment = False
        """Whether a comment was read."""
        self.is_known = False
        """Whether the first event was read, or the stream counts as good without one."""
        self.error: EngineError | None = None

    def feed(self, chunk: bytes, *, end_of_stream: bool) -> None:
        """Read the next chunk, until the first event that is no preamble is complete."""
        if self.is_known:
            return
        piece = chunk[: self._room]
        self._room -= len(piece)
        self._read_lines(piece)
        if not self.is_known and self._room and end_of_stream:  # the last event needs no empty line behind it
            self._read_line(self._complete(b""))
            self._end_event()
        if self.is_known or end_of_stream or not self._room:
            self.is_known = True
            self._line.clear()
            self._data.clear()

    def _read_lines(self, piece: bytes) -> None:
        if not piece:
            return
        last = piece[-1:]
        lines = (piece[1:] if self._after_return and piece.startswith(b"\n") else piece).splitlines()
        self._after_return = last == b"\r"
        rest = b"" if last in {b"\r", b"\n"} else lines.pop()
        if lines:
            lines[0] = self._complete(lines[0])
        if rest:
            self._line.append(rest)
        for line in lines:
            if line:
                self._read_line(line)
            elif self._data:
                self._end_event()
                if self.is_known:
                    return

    def _complete(self, end: bytes) -> bytes:
        line = b"".join((*self._line, end))
        self._line.clear()
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(BOM_UTF8)
        return line

    def _read_line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].strip())
        elif line.startswith(b":"):  # other lines are fields without an error
            self.has_comment = True

    def _end_event(self) -> None:
        text = b"\n".join(self._data)
        self._data.clear()
        if text:
            self.is_known, self.error = _judge(text)


def _judge(text: bytes) -> tuple[bool, EngineError | None]:
    """Return whether an event decides how the stream begins, and the error if it is one."""
    try:
        found = msgspec.json.decode(text)
        if isinstance(found, list):  # the form of a batch on /generate
            found = next((each for each in found if isinstance(each, dict) and _error_of(each)), None)
        kind = found.get("type") if isinstance(found, dict) else None
        if isinstance(kind, str) and kind in _PREAMBLE:
            return False, None
        return True, _error_of(found) if isinstance(found, dict) else None
    except _UNREADABLE:  # [DONE], or whatever it is
        return True, None


def _error_of(event: dict[str, Any]) -> EngineError | None:
    if isinstance(error := event.get("error"), dict):
        return EngineError(_status(error.get("code")), msgspec.json.encode(event))
    if event.get("type") == "response.failed":
        response = event.get("response")
        error = response.get("error") if isinstance(response, dict) else None
        return EngineError(_status(None), msgspec.json.encode({"error": error}))
    meta = event.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort" and isinstance(reason.get("status_code"), int):
        error = {"message": str(reason.get("message", ""))}
        return EngineError(_status(reason["status_code"]), msgspec.json.encode({"error": error}))
    return None


def _status(code: object) -> int:
    return code if isinstance(code, int) and 400 <= code < 600 else 500
