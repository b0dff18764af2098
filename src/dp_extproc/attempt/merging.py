"""What only the prefill leg's response has, on its way into the client's response."""

from typing import Final

from dp_extproc.attempt import replies
from dp_extproc.attempt.events import (
    BufferBody,
    Continue,
    Mutate,
    Phase,
    Reply,
    ResponseBody,
    ResponseTrailers,
    StreamBody,
)
from dp_extproc.attempt.failures import Blame, Failure
from dp_extproc.engines.model import Role
from dp_extproc.request.error_shapes import ErrorShape
from dp_extproc.request.prompt_parts import PromptPart
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.echo import read_echo
from dp_extproc.response.logprobs import read_prefill
from dp_extproc.response.merging import LegText, Merger, NoMerger, StreamMerger, WholeMerger

_READERS: Final = {PromptPart.LOGPROBS: read_prefill, PromptPart.ECHO: read_echo}
COMPRESSED: Final = Failure(
    Role.DECODE,
    Reason.ANSWER_INCOMPLETE,
    502,
    "the decode server's response is compressed, so the prompt's part cannot be put into it",
    blame=Blame.NONE,
)
"""The failure of a response whose encoding cannot be read."""
_NOTHING_READ: Final = "the prefill leg's response did not come in time, or cannot be read"


class Merging:
    """Merges a part of the prompt into the pieces of one response, in order.

    A response that cannot be merged becomes an error: an evaluation must not score what is missing.
    """

    __slots__ = ("_errors", "_has_failed", "_merger", "_part", "pieces", "since", "streaming", "text")

    def __init__(self, part: PromptPart, *, streaming: bool, errors: ErrorShape) -> None:
        self.text = LegText()
        """The text of the prefill leg's response."""
        self._part = part
        self._errors = errors
        self.streaming = streaming
        self._merger: Merger | None = None
        self._has_failed = False
        """Whether the client has got an error in place of the response, or of the rest of it."""
        self.pieces: list[ResponseBody | ResponseTrailers] = []
        """Pieces of the response that wait for the text."""
        self.since = 0.0
        """The moment at which the first piece had to wait."""

    @property
    def awaits_text(self) -> bool:
        """Whether the merge has not begun, and the text is not complete."""
        return self._merger is None and not self.text.is_complete

    @property
    def problem(self) -> str | None:
        """The reason why the response, or the rest of it, was not merged."""
        return None if self._merger is None else self._merger.problem

    def ask(self) -> Reply:
        """Ask for the body of the response."""
        return StreamBody() if self.streaming else BufferBody()

    def merge_pieces(self) -> list[Reply]:
        """Merge the pieces that have waited."""
        pieces, self.pieces = self.pieces, []
        return [
            Continue(Phase.RESPONSE_TRAILERS) if isinstance(piece, ResponseTrailers) else self.merge(piece)
            for piece in pieces
        ]

    def merge(self, event: ResponseBody) -> Reply:
        """Merge a piece of the response, whether the text is there or not."""
        merger = self._merger = self._merger or self._make_merger()
        merged = merger.feed(event.data, end_of_stream=event.end_of_stream)
        if merger.problem is not None and not self._has_failed:
            self._has_failed = True
            message = f"the answer would lack the log probabilities of the prompt: {merger.problem}"
            error = Rejection(502, Reason.ANSWER_INCOMPLETE, message)
            if not self.streaming:  # its headers have not gone out yet
                return replies.refuse(error, self._errors)
            merged += b"data: " + error.body(self._errors) + b"\n\ndata: [DONE]\n\n"
        # The headers of a whole response have not gone out yet, so its length can still be set.
        length = () if self.streaming else (("content-length", b"%d" % len(merged)),)
        return Mutate(Phase.RESPONSE_BODY, body=merged, set_headers=length)

    def _make_merger(self) -> Merger:
        graft = _READERS[self._part](self.text.read())
        if graft is None:
            return NoMerger(_NOTHING_READ)
        return StreamMerger(graft) if self.streaming else WholeMerger(graft)
