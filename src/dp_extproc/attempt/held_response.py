"""A response that is held: its head, and the pieces of its body that have come behind it."""

from collections.abc import Iterator
from typing import Final

from dp_extproc.attempt import replies
from dp_extproc.attempt.events import BodyMode, Reply, ResponseBody, ResponseTrailers

KEPT_BYTES: Final = 1 << 20
"""Most bytes of a response that are kept behind headers that are held, before the response goes to the client."""


class HeldResponse:
    """Keeps the pieces of a response until it may go to the client."""

    __slots__ = ("_bytes", "_pieces", "longest", "since")

    def __init__(self, longest: float) -> None:
        """Set up; *longest* is for how many seconds the headers may be held."""
        self.longest = longest
        self.since = 0.0
        """The time at which the headers came."""
        self._pieces: list[ResponseBody | ResponseTrailers] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether no more may be kept."""
        return self._bytes > KEPT_BYTES

    def keep(self, event: ResponseBody | ResponseTrailers) -> None:
        """Keep a piece."""
        self._pieces.append(event)
        self._bytes += len(event.data) if isinstance(event, ResponseBody) else 0

    def release(self, mode: BodyMode) -> Iterator[Reply]:
        """Pass all pieces on."""
        kept, self._pieces = self._pieces, []
        return (replies.pass_on(mode, piece) for piece in kept)
