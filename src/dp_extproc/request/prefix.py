"""What a prompt begins with, as a chain of hashes: two prompts share a beginning as far as their chains are equal.

The JSON text is hashed as it stands, in the order in which the chat template puts it. A conversation that goes on
has its earlier turns as the very same bytes, if its client serialises alike, which clients do. What changes the KV
cache without being a part of the prompt (the model, an adapter, a salt) is where the chain starts.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import xxhash
from msgspec import Struct

from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.path import Api

BLOCK_BYTES: Final = 1024
"""Of JSON; about 250 tokens. What is shared beyond the last whole block is not seen."""
_WIDER_AFTER: Final = 64
"""Blocks get four times as long after so many, so that a megabyte has few. Where they end depends on nothing else."""
_WIDEST: Final = 64 << 10
_LEAST_BYTES: Final = 256
"""A last block shorter than this is left out: there is nothing to be won by so few tokens."""

_SEEDS: Final = ("model", "lora_path", "extra_key", "cache_salt")
_BEFORE: Final = {
    Api.CHAT: ("tools",),
    Api.MESSAGES: ("tools", "system"),
    Api.RESPONSES: ("tools", "instructions"),
}
_PROMPTS: Final = {
    Api.CHAT: ("messages",),
    Api.MESSAGES: ("messages",),
    Api.RESPONSES: ("input",),
    Api.COMPLETIONS: ("prompt",),
    Api.GENERATE: ("text", "input_ids"),
}


class Prefix(Struct, frozen=True):
    """A prompt's chain."""

    blocks: tuple[int, ...]
    """64 bits each; one stands for everything from the start to the end of its block."""
    ends: tuple[int, ...]
    """Bytes from the start to the end of each block."""

    def tokens_until(self, blocks: int, tokens: float) -> float:
        """Tell how many of the prompt's *tokens* the first so many blocks have."""
        return tokens * self.ends[blocks - 1] / self.ends[-1] if blocks else 0.0


NO_PREFIX: Final = Prefix((), ())


def prefix_of(request: InferenceRequest) -> Prefix:
    """Hash what a prompt begins with. A batch has several prompts, and so no beginning."""
    if request.prompt.batch is not None:
        return NO_PREFIX
    values, api = request.body.values, request.api
    chain = xxhash.xxh3_64()
    for key in _SEEDS:
        if key in values:
            chain.update(memoryview(values[key]))
        chain.update(b"\0")
    blocks: list[int] = []
    ends: list[int] = []
    for key in _BEFORE.get(api, ()):
        if key in values:
            _hash(chain, memoryview(values[key]), blocks, ends)
        chain.update(b"\0")
    for key in _PROMPTS[api]:
        if key in values and values[key] != _NULL:
            # Without the closing bracket or quote: what follows there is the next turn.
            _hash(chain, memoryview(values[key])[:-1], blocks, ends)
            break
    return Prefix(tuple(blocks), tuple(ends)) if blocks else NO_PREFIX


_NULL: Final = msgspec.Raw(b"null")


def _hash(chain: "xxhash.xxh3_64", text: memoryview, blocks: list[int], ends: list[int]) -> None:
    """Append the blocks of one member."""
    start, before = 0, ends[-1] if ends else 0
    for end in _ends(len(text)):
        chain.update(text[start:end])
        blocks.append(chain.intdigest())
        ends.append(before + end)
        start = end
    chain.update(text[start:])


def _ends(size: int) -> Sequence[int]:
    """Tell where the blocks of so many bytes end."""
    if size <= BLOCK_BYTES * _WIDER_AFTER:  # nearly always
        ends = list(range(BLOCK_BYTES, size + 1, BLOCK_BYTES))
    else:
        ends, width, end = [], BLOCK_BYTES, 0
        while end + width <= size:
            end += width
            ends.append(end)
            if len(ends) % _WIDER_AFTER == 0:
                width = min(_WIDEST, 4 * width)
    if size - (ends[-1] if ends else 0) >= _LEAST_BYTES:
        ends.append(size)
    return ends
