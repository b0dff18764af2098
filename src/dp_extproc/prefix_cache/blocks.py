"""What a prompt begins with, as hashes by which prompts are compared that were sent at different times.

The bytes of the JSON are hashed as they stand, in the order in which chat templates use them. Nothing is decoded:
equal bytes make equal tokens, and conversations that go on repeat their earlier turns byte by byte. Every hash is of
all bytes up to a cut, so where cuts are can differ from prompt to prompt: some lie at fixed distances, so that any two
prompts have them in common; the others between messages, where an earlier prompt of the conversation may have ended.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, chain, repeat, takewhile
from operator import le
from typing import Final

from msgspec import Raw, Struct
from xxhash import xxh3_64

from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.path import Api

_BLOCK_BYTES: Final = 1024
"""Distance of the first cuts: some 250 tokens."""
_GROWTH: Final = 16
"""Later cuts are as far apart as this part of what lies before them. So a mebibyte has fewer than a hundred, and of
what two prompts have in common at most a sixteenth goes unnoticed."""
_LARGEST: Final = 1 << 30
"""Bytes. Behind it there are no cuts."""

_LEAST_BYTES: Final = 256
"""Shorter prompts have no beginning: there is nothing to be won by so few tokens."""

_LOOK_BACK: Final = 8
"""Messages at the end of a conversation that may be new since the prompt before: an answer, its tool calls' results."""
_LOOK_BACK_BYTES: Final = 1 << 16
"""Where those messages are looked for."""

_CONDITIONS: Final = (
    "model", "lora_path", "extra_key", "cache_salt", "image_data", "video_data", "audio_data", "chat_template_kwargs",
    "reasoning_effort",
)  # fmt: skip
"""Under which two equal prompts have the same KV cache. SGLang keys its cache by the adapter, ``extra_key`` and
``cache_salt``; media beside a text stand somewhere within it, and what chat templates are told at its beginning."""

_ORDER: Final = {
    Api.GENERATE: ("text", "input_ids"),
    Api.COMPLETIONS: ("prompt",),
    Api.CHAT: ("tools", "messages"),
    Api.RESPONSES: ("tools", "instructions", "input"),
    Api.MESSAGES: ("tools", "system", "messages"),
}
"""The members that make the prompt, in the order of most chat templates."""

_IDS: Final = ("input_ids",)
"""Those of a chat are its prompt, whatever else it says."""

_FIRST_ITEM: Final = re.compile(rb'\[(?P<gap>\s*)(?P<key>\{\s*"[^"\\]{1,64}"\s*:)(?P<space> ?)')
"""How the first item of a list begins tells how the others do, and how they are set apart."""
_FIRST_ITEM_BYTES: Final = 256


class Prefix(Struct, frozen=True):
    """What a prompt begins with."""

    blocks: tuple[int, ...] = ()
    """64-bit hashes, each of the prompt up to the end of one block. Prompts that share one are equal up to there."""
    ends: tuple[int, ...] = ()
    """Where each block ends, in bytes from the start; ascending. Left out if all blocks are of one size."""

    def __post_init__(self) -> None:
        """Check what other replicas have sent.

        Raises:
            ValueError: The ends are not those of the blocks.
        """
        ends = self.ends
        if ends and not (len(ends) == len(self.blocks) and ends[-1] > 0 and all(map(le, chain((0,), ends), ends))):
            raise ValueError("every block ends behind the one before, and the last one not at 0")

    def tokens_in(self, blocks: int, prompt_tokens: float) -> float:
        """Tell how many of the prompt's tokens are in its first *blocks* blocks, one or more of them."""
        ends = self.ends
        return prompt_tokens * ((ends[blocks - 1] / ends[-1]) if ends else (blocks / len(self.blocks)))


NO_PREFIX: Final = Prefix()


def prefix_of(request: InferenceRequest) -> Prefix:
    """Hash what the prompt of a request begins with.

    Returns:
        Blocks up to the very end of the prompt, so that a repeated prompt is recognised as a whole. None at all for a
        list of prompts, which has no beginning, for embeddings, which engines do not cache, and for a few words.
    """
    if request.prompt.batch is not None:
        return NO_PREFIX
    values = request.body.values
    is_chat_of_ids = request.api is Api.CHAT and _view(values.get("input_ids")) is not None
    order = _IDS if is_chat_of_ids else _ORDER[request.api]
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
    """Give a member's bytes, if it is there and not null."""
    if raw is None:
        return None
    view = memoryview(raw)
    return None if bytes(view[:4]) == b"null" else view


def _without_closing(view: memoryview) -> memoryview:
    """Leave off what follows the last message or character, where a longer prompt goes on."""
    end = len(view) - 1
    while end > 1 and view[end - 1] in b" \t\n\r":
        end -= 1
    return view[:end]


def _cuts(view: memoryview, *, between_items: bool) -> list[int]:
    """Give the ends of all blocks, ascending; the last one is the end of the view."""
    length = len(view)
    cuts = [*_GRID[: bisect_left(_GRID, length)], length]
    if between_items:
        cuts.extend(_ends_of_items(view))
        cuts = sorted(set(cuts))
    return cuts


def _ends_of_items(view: memoryview) -> Iterator[int]:
    """Find the ends of the last items of a list, the very last excepted. Now and then it is that of an inner list."""
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


_GRID: Final = tuple(
    takewhile(
        lambda cut: cut <= _LARGEST,
        accumulate(chain((0,), repeat(0)), lambda cut, _: cut + max(_BLOCK_BYTES, cut // _GROWTH)),
    )
)[1:]
