"""How a body is cut for duplex."""

from collections.abc import Iterator
from typing import Final

from dp_extproc.attempt.events import Phase, StreamedChunk

CHUNK_BYTES: Final = 62_000
"""Largest chunk of a duplex body. The protocol recommends at most 64 KiB; this leaves room for the framing."""


def cut(body: bytes, *, end_of_stream: bool) -> Iterator[StreamedChunk]:
    """Cut a body; an empty one is one empty chunk. Only the last chunk may end the stream."""
    view = memoryview(body)
    last = max(0, (len(body) - 1) // CHUNK_BYTES)
    for index in range(last + 1):
        piece = bytes(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        yield StreamedChunk(Phase.REQUEST_BODY, piece, end_of_stream and index == last)
