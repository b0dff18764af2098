"""What a request costs, and where it was placed: the records that replicas publish to each other."""

from typing import Annotated, Final, NamedTuple

from msgspec import Meta, Struct

from dp_extproc.engines.quantities import Amount, Count
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix

SESSION_KEPT: Final = 128
"""Characters of a conversation's name that are kept. No usual id is longer."""

_Sequences = Annotated[float, Meta(ge=0, lt=1 << 32)]
"""No body is large enough for so many prompts."""


class RequestCost(Struct, frozen=True):
    """The work that a request is. Its bounds are checked when a peer's record is decoded."""

    tokens: Amount
    """Tokens of its prompt; for a batch, of all its prompts."""
    requests: _Sequences = 1.0
    """Sequences that it makes."""
    prefix: Prefix = NO_PREFIX
    """The prefix blocks of its prompt."""
    session: Annotated[str, Meta(max_length=SESSION_KEPT)] | None = None
    """The client's name for a conversation."""
    text_bytes: Count = 0
    """Bytes of the prompt that are text, whose tokens are estimated."""
    known_tokens: Count = 0
    """Tokens of the prompt that came as token ids, or are estimated of media."""
    has_media: bool = False
    """Whether the prompt has images, sound or video, of which the tokens are a rough estimate."""


class Work(NamedTuple):
    """The work of requests that wait for a reservation."""

    tokens: float
    """Prompt tokens."""
    requests: float
    """Sequences."""


NO_WORK: Final = Work(0.0, 0.0)


class PlacementRecord(Struct, frozen=True, rename={"cost": "demand"}):  # as older releases call it
    """Where one request was placed. Its bounds are checked when a peer's record is decoded."""

    pool: str
    cost: RequestCost
    decode: str
    """URL of the endpoint that answers the client; of an aggregated endpoint, too."""
    decode_rank: Count | None
    """None if the engine picks it."""
    prefill: str | None = None
    """URL; None in aggregated pools."""
    prefill_rank: Count | None = None
    cached: Amount = 0.0
    """Prompt tokens that are expected in the prefix cache of the rank that computes the prompt."""
