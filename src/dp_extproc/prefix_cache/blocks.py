"""The prefix of a prompt, as hashes of blocks by which prompts of different times are compared.

The bytes of the JSON are hashed as they are, in the order in which chat templates use them. They are not decoded: equal
bytes make equal tokens, and a conversation that goes on repeats its earlier turns byte by byte. Each hash is of all
bytes up to a cut, so that the cuts of two prompts may differ. Some cuts are at fixed distances, which all prompts have
in common. The others are between messages, where an earlier prompt of the conversation may have ended.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from operator import le
from typing import Final

from msgspec import Raw, Struct
from xxhash import xxh3_64

from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.path import Api

_BLOCK_BYTES: Final = 1024
"""Bytes between the first cuts, which is about 250 tokens."""
_GROWTH: Final = 16
"""Ratio of the bytes before a later cut to its distance from the next one. With it a mebibyte has fewer than a hundred
cuts, and at most a sixteenth of a common prefix is missed."""
_LARGEST: Final = 1 << 30
"""Bytes after which there are no more cuts."""
_LEAST_BYTES: Final = 256
"""Bytes below which a prompt has no prefix: so few tokens are not worth a rank."""
_LOOK_BACK: Final = 8
"""Messages at the end of a conversation that may be new since its last prompt: an answer, results of tool calls."""
_LOOK_BACK_BYTES: Final = 1 << 16
"""Bytes at the end of a prompt in which those messages are searched."""
_CONDITIONS: Final = (
    "model", "lora_path", "extra_key", "cache_salt", "image_data", "video_data", "audio_data", "chat_template_kwargs",
    "reasoning_effort",
)  # fmt: skip
"""Members that must be equal for equal prompts to share KV cache. SGLang keys its cache by the adapter, ``extra_key``
and ``cache_salt``. Media beside a text are somewhere in it, and arguments of chat templates at its beginning."""
_ORDER: Final = {
    Api.GENERATE: ("text", "input_ids"),
    Api.COMPLETIONS: ("prompt",),
    Api.CHAT: ("tools", "messages"),
    Api.RESPONSES: ("tools", "instructions", "input"),
    Api.MESSAGES: ("tools", "system", "messages"),
}
"""The members that make the prompt, in the order of most chat templates."""
_FIRST_ITEM: Final = re.compile(rb'\[(?P<gap>\s*)(?P<key>\{\s*"[^"\\]{1,64}"\s*:)(?P<space> ?)')
"""The beginning of a list's first item, from which follows how other items begin and are separated."""
_FIRST_ITEM_BYTES: Final = 256
"""Bytes in which that beginning is searched."""


class Prefix(Struct, frozen=True):
    """The prefix of a prompt, block by block."""

    blocks: tuple[int, ...] = ()
    """64-bit hashes, each of the prompt up to the end of one block. Prompts that share one are equal up to there."""
    ends: tuple[int, ...] = ()
    """The end of each block, in bytes from the start; ascending. Empty if all blocks are of one size."""

    def __post_init__(self) -> None:
        """Raise :exc:`ValueError` if a peer has sent ends that are not those of the blocks."""
        ends = self.ends
        if ends and not (len(ends) == len(self.blocks) and ends[-1] > 0 and all(map(le, chain((0,), ends), ends))):
            raise ValueError("every block ends behind the one before, and the last one not at 0")

    def tokens_in(self, blocks: int, prompt_tokens: float) -> float:
        """Return how many of the prompt's tokens are in its first *blocks* blocks, one or more of them."""
        ends = self.ends
        return prompt_tokens * ((ends[blocks - 1] / ends[-1]) if ends else (blocks / len(self.blocks)))


NO_PREFIX: Final = Prefix()


def prefix_of(request: InferenceRequest) -> Prefix:
    """Hash the blocks of a request's prompt.

    Returns:
        Blocks up to the very end of the prompt, so that a repeated prompt is recognised as a whole. No blocks for a
        list of prompts, which has no common prefix, for embeddings, which engines do not cache, and for a few words.
    """
    if request.prompt.batch is not None:
        return NO_PREFIX
    values = request.body.values
    order: tuple[str, ...] = _ORDER[request.api]
    if request.api is Api.CHAT and _view(values.get("input_ids")) is not None:
        order = ("input_ids",)  # they are the prompt of a chat, whatever its other members are
    parts = [(name, view) for name in order if (view := _view(values.get(name))) is not None]
    if not parts:
        return NO_PREFIX
    state = xxh3_64(request.api.encode())
    update, digest = state.update, state.intdigest
    for name in _CONDITIONS:
        if (raw := values.get(name)) is not None:
            update(name.encode())
            update(memoryview(raw))
    blocks: list[int] = []
    ends: list[int] = []
    before = 0
    last = parts[-1][0]
    for name, whole in parts:
        view = _without_closing(whole) if name == last else whole
        update(name.encode())
        start = 0
        for end in _cuts(view, between_items=name == last):
            update(view[start:end])
            blocks.append(digest())
            ends.append(before + end)
            start = end
        before += start
    return Prefix(tuple(blocks), tuple(ends)) if before >= _LEAST_BYTES else NO_PREFIX


def _view(raw: Raw | None) -> memoryview | None:
    """Return the bytes of a member; None if it is missing or null."""
    if raw is None:
        return None
    view = memoryview(raw)
    return None if bytes(view[:4]) == b"null" else view


def _without_closing(view: memoryview) -> memoryview:
    """Cut off what follows the last message or character, where a longer prompt goes on."""
    end = len(view) - 1
    while end > 1 and view[end - 1] in b" \t\n\r":
        end -= 1
    return view[:end]


def _cuts(view: memoryview, *, between_items: bool) -> list[int]:
    """Return the ends of all blocks, ascending; the last one is the end of the view."""
    cuts = [*_GRID[: bisect_left(_GRID, len(view))], len(view)]
    return sorted({*cuts, *_ends_of_items(view)}) if between_items else cuts


def _ends_of_items(view: memoryview) -> Iterator[int]:
    """Find the ends of a list's last items, except the very last one. Rarely it is the end of an inner item."""
    first = _FIRST_ITEM.match(view[:_FIRST_ITEM_BYTES])
    if first is None:
        return
    gap, key, space = first.groups()
    separator = b"}," + (gap or space) + key
    start = max(0, len(view) - _LOOK_BACK_BYTES)
    window = bytes(view[start:])
    found = len(window)
    for _ in range(_LOOK_BACK):
        found = window.rfind(separator, 0, found)
        if found < 0:
            return
        yield start + found + 1


def _fixed_cuts() -> Iterator[int]:
    cut = _BLOCK_BYTES
    while cut <= _LARGEST:
        yield cut
        cut += max(_BLOCK_BYTES, cut // _GROWTH)


_GRID: Final = tuple(_fixed_cuts())
"""The cuts at fixed distances, in bytes from the start of a member."""
