"""Log probabilities of the prompt, which the prefill leg's response has, on their way into the client's response."""

from dp_extproc.attempt.events import Continue, Mutate, Phase, Reply, ResponseBody, ResponseTrailers
from dp_extproc.response.logprobs import LegText, Merger, make_merger


class Merging:
    """Merges the log probabilities into the pieces of one response, in order."""

    __slots__ = ("_merger", "_text", "pieces", "since", "streaming")

    def __init__(self, text: LegText, *, streaming: bool) -> None:
        self._text = text
        self.streaming = streaming
        self._merger: Merger | None = None
        self.pieces: list[ResponseBody | ResponseTrailers] = []
        """Pieces of the response that wait for the text."""
        self.since = 0.0
        """The moment at which the first piece had to wait."""

    @property
    def awaits_text(self) -> bool:
        """Whether the merge has not begun, and the text is not complete."""
        return self._merger is None and not self._text.is_complete

    @property
    def problem(self) -> str | None:
        """The reason why the response, or a part of it, was not merged."""
        return None if self._merger is None else self._merger.problem

    def merge_pieces(self) -> list[Reply]:
        """Merge the pieces that have waited."""
        pieces, self.pieces = self.pieces, []
        return [
            Continue(Phase.RESPONSE_TRAILERS) if isinstance(piece, ResponseTrailers) else self.merge(piece)
            for piece in pieces
        ]

    def merge(self, event: ResponseBody) -> Mutate:
        """Merge a piece of the response, whether the text is there or not."""
        if self._merger is None:
            self._merger = make_merger(self._text.read(), streaming=self.streaming)
        merged = self._merger.feed(event.data, end_of_stream=event.end_of_stream)
        # The headers of a whole response have not gone out yet, so its length can still be set.
        length = () if self.streaming else (("content-length", b"%d" % len(merged)),)
        return Mutate(Phase.RESPONSE_BODY, body=merged, set_headers=length)
