"""What a request asks of the engines."""

from msgspec import Struct

from dp_extproc.request.prefix import NO_PREFIX, Prefix


class Demand(Struct, frozen=True):
    """The work that a request is."""

    tokens: float
    """Of its prompt; of a batch, of all its prompts."""
    requests: float = 1.0
    """Sequences that it makes."""
    prefix: Prefix = NO_PREFIX
    """What the prompt begins with."""
    session: str | None = None
    """The client's name for a conversation."""
    text_bytes: int = 0
    """Of the prompt, what is text and was estimated ..."""
    known_tokens: int = 0
    """... and what came as tokens."""
