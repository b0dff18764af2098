"""What a request asks of the engines."""

from typing import Annotated, Final

from msgspec import Meta, Struct

from dp_extproc.engines.quantities import Amount, Count
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix

SESSION_KEPT: Final = 128
"""Characters of a conversation's name; more is more than any id has."""

_Sequences = Annotated[float, Meta(ge=0, lt=1 << 32)]
"""No body is large enough for so many prompts."""


class RequestCost(Struct, frozen=True):
    """The work that a request is. The bounds are checked where another replica tells of it."""

    tokens: Amount
    """Of its prompt; of a batch, of all its prompts."""
    requests: _Sequences = 1.0
    """Sequences that it makes."""
    prefix: Prefix = NO_PREFIX
    """What the prompt begins with."""
    session: Annotated[str, Meta(max_length=SESSION_KEPT)] | None = None
    """The client's name for a conversation."""
    text_bytes: Count = 0
    """Of the prompt, what is text and was estimated ..."""
    known_tokens: Count = 0
    """... and what came as tokens."""
