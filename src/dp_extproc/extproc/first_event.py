"""Whether a stream of events begins with an error.

SGLang begins most streams with status 200 and tells what went wrong in the first event, each API in its own way:
``data: {"error": ...}`` on the OpenAI paths (serving_chat.py), a final state of kind "abort" on /generate
(tokenizer_manager.py), ``event: error`` on /v1/messages, ``response.failed`` on /v1/responses.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct

_MOST_BYTES: Final = 1 << 16
"""Of what is looked at. Larger first events are answers: errors are short."""
_PREAMBLE: Final = frozenset({
    "message_start", "ping", "content_block_start",  # Anthropic's
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
})  # fmt: skip
"""Events that come before anything is known of the answer."""


class EngineError(Struct, frozen=True):
    """An error that stands where an answer should begin."""

    status: int
    body: bytes
    """As JSON: what the same error looks like when it is not in a stream."""


class FirstEvent:
    """Reads a stream's beginning, chunk by chunk."""

    __slots__ = ("_text", "error", "is_known")

    def __init__(self) -> None:
        self._text = b""
        self.is_known = False
        """Whether enough was read."""
        self.error: EngineError | None = None

    def feed(self, chunk: bytes, *, end_of_stream: bool) -> None:
        """Read on, until the first event that says something is complete."""
        if self.is_known:
            return
        self._text = (self._text + chunk).replace(b"\r\n", b"\n")
        while not self.is_known:
            event, separator, rest = self._text.partition(b"\n\n")
            if not separator and not end_of_stream:
                self.is_known = len(self._text) >= _MOST_BYTES
                return
            self._text = rest
            self._read(event)
            self.is_known = self.is_known or (end_of_stream and not rest)

    def _read(self, event: bytes) -> None:
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not data:  # a comment, or nothing at all
            return
        try:
            found = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # [DONE], or whatever it is
            self.is_known = True
            return
        if isinstance(found, list):  # /generate tells of a batch so
            found = next((each for each in found if isinstance(each, dict) and _error_of(each)), None)
        kind = found.get("type") if isinstance(found, dict) else None
        if isinstance(kind, str) and kind in _PREAMBLE:
            return
        self.is_known = True
        if isinstance(found, dict):
            self.error = _error_of(found)


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
