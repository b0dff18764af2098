"""The text of an engine's error on its way to the client, without routing fields and in the shape of its path."""

from collections.abc import Iterator
from typing import Final

import msgspec

from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Continue,
    Mutate,
    Phase,
    Reply,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamedChunk,
)
from dp_extproc.attempt.gateways import Headers
from dp_extproc.request.error_shapes import ErrorShape, anthropic_type, error_members, openai_type
from dp_extproc.request.rejection import Reason
from dp_extproc.response.engine_text import flat_message, no_answer, reshape, scrub
from dp_extproc.response.renaming import Renamer, Renames

_FAILED: Final = 500
MOST_BYTES: Final = 60_000
"""Bytes of the longest text that a client gets as a whole. Validation errors repeat the request's body, of many MiB."""
_SHOWN_BYTES: Final = 2000
"""Bytes that a client gets of a longer one."""


def write_error(text: bytes, status: int, shape: ErrorShape, renames: Renames | None = None) -> bytes:
    """Write the text of an engine's error, or of the proxy before it, as the client may see it."""
    if (cause := no_answer(text)) is not None:
        return _write(shape, status, f"the engine did not answer: {cause}")
    if len(text) > MOST_BYTES:
        begin = scrub(text[:_SHOWN_BYTES]).decode(errors="replace").rpartition(" ")[0]
        return _write(
            shape, status, f"the engine answered with more than {MOST_BYTES} bytes of text, which begin: {begin}"
        )
    if renames is not None:
        text = Renamer(renames).feed(text, end_of_stream=True)
    own = scrub(text)
    if shape is ErrorShape.OPENAI:
        return reshape(own, openai_type(status))
    message = flat_message(own)
    if message is None:
        return own
    return msgspec.json.encode({"type": "error", "error": {"type": anthropic_type(status), "message": message}})


def _write(shape: ErrorShape, status: int, message: str) -> bytes:
    reason = Reason.ENGINE_REFUSED if status < _FAILED else Reason.DECODE_FAILED
    return msgspec.json.encode(error_members(shape, status, message, reason.value))


class ErrorText:
    """Collects the text of one error, while the headers of the response are held."""

    __slots__ = ("_is_duplex", "_last", "_renames", "_size", "_status", "_text", "is_loss", "is_readable")

    def __init__(self, event: ResponseHeaders, mode: BodyMode, *, is_sent: bool, renames: Renames | None) -> None:
        """Begin.

        Args:
            event: The headers of the error.
            mode: The mode of the response body.
            is_sent: Whether the gateway sends the body when it is asked for it.
            renames: The ids in the text that are to be those of the client.
        """
        self._is_duplex = mode is BodyMode.DUPLEX
        self._status = event.status
        self._renames = renames
        self._text: list[bytes] = []
        self._size = 0
        self._last: ResponseBody | ResponseTrailers | None = None
        self.is_loss = event.is_loss
        """Whether it is Envoy's own, for an engine that dropped a request that it had accepted."""
        self.is_readable = (is_sent or self._is_duplex) and not (event.end_of_stream or event.is_encoded)
        """Whether a text comes here that can be read."""

    @property
    def text(self) -> bytes:
        """What has come so far, as far as it is kept."""
        return b"".join(self._text)

    def ask(self) -> tuple[Reply, ...]:
        """Ask for the text. In full duplex it comes unasked, and no reply holds the headers."""
        return () if self._is_duplex else (BufferBody(),)

    def take(self, event: ResponseBody | ResponseTrailers) -> bool:
        """Take in a piece, and return whether the text is complete."""
        self._last = event
        if isinstance(event, ResponseTrailers):
            return True
        if self._size <= MOST_BYTES:
            self._text.append(event.data)
        self._size += len(event.data)
        return event.end_of_stream or not self._is_duplex

    def pass_on(self, headers: Headers, remove: tuple[str, ...], shape: ErrorShape) -> Iterator[Reply]:
        """Let the response go on, with its text rewritten.

        Args:
            headers: Headers that the response gets.
            remove: Names of headers that are removed.
            shape: The shape of the client's errors.
        """
        if self._last is None:
            yield _mutate(Phase.RESPONSE_HEADERS, headers, remove)
            return
        text = self.text
        own = write_error(text, self._status, shape, self._renames) if text else text
        if own != text and own.startswith(b"{"):
            headers = (*headers, ("content-type", b"application/json"))
        has_trailers = isinstance(self._last, ResponseTrailers)
        if self._is_duplex:
            yield _mutate(Phase.RESPONSE_HEADERS, headers, remove)
            yield StreamedChunk(Phase.RESPONSE_BODY, own, not has_trailers)
        elif not has_trailers:
            length = () if own == text else (("content-length", b"%d" % len(own)),)
            yield _mutate(Phase.RESPONSE_BODY, (*headers, *length), remove, None if own == text else own)
        if has_trailers:
            yield Continue(Phase.RESPONSE_TRAILERS)


def _mutate(phase: Phase, headers: Headers, remove: tuple[str, ...], body: bytes | None = None) -> Reply:
    if not (headers or remove or body is not None):
        return Continue(phase)
    return Mutate(phase, set_headers=headers, remove_headers=remove, body=body)
