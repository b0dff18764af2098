"""Who holds the KV cache of which prompts' beginnings, as far as it can be known from what was sent where. Pure.

Engines keep what they have computed for the next prompt with the same beginning, and evict what was not used for
longest, leaves first. The index does the same with hashes, slot by slot, with the capacity that the engine tells.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from dp_extproc.request.prefix import Prefix

_S = TypeVar("_S", bound=Hashable)

_UNKNOWN_CAPACITY: Final = 1 << 18
"""Tokens that a slot is taken to hold until its engine tells."""
_MOST_BLOCKS: Final = 1 << 14
"""Per slot; four million tokens in whole blocks."""
_MOST_SESSIONS: Final = 100_000
_LISTED: Final = 64
"""Slots that an answer lists at most. A beginning that more of them hold is taken to be held by all."""


@dataclass(frozen=True, slots=True)
class Held(Generic[_S]):
    """Which tokens of a prompt need not be computed."""

    by_slot: Mapping[_S, float]
    """Of the slots that hold the longest beginnings."""
    elsewhere: float
    """Of every other slot: more than 0 for what nearly all of them hold, such as a system prompt."""


class PrefixIndex(Generic[_S]):
    """What each slot holds. A slot is whatever has a cache of its own: one DP rank of one server."""

    def __init__(self) -> None:
        self._holders: dict[int, set[_S]] = {}
        """By block."""
        self._caches: dict[_S, _Cache] = {}
        self._sessions: OrderedDict[str, tuple[_S, float]] = OrderedDict()

    def held(self, prefix: Prefix, tokens: float, session: str | None = None) -> Held[_S]:
        """Tell who holds how much of a prompt.

        Args:
            prefix: What it begins with.
            tokens: Of the whole prompt.
            session: The client's name for the conversation. Its last prompt is taken for the beginning of this one,
                where no block tells more.
        """
        by_slot: dict[_S, float] = {}
        elsewhere = 0.0
        holders = self._holders
        depth = 0
        for block in prefix.blocks:
            if block not in holders:
                break
            depth += 1
        for level in range(depth, 0, -1):
            slots = holders[prefix.blocks[level - 1]]
            if len(slots) == len(by_slot):
                continue  # the same ones: who holds a block holds those before it
            if len(slots) > _LISTED:
                if 2 * len(slots) > len(self._caches):
                    elsewhere = prefix.tokens_until(level, tokens)
                break
            share = prefix.tokens_until(level, tokens)
            for slot in slots:
                by_slot.setdefault(slot, share)
        if session is not None and (known := self._sessions.get(session)) is not None:
            slot, before = known
            by_slot[slot] = max(by_slot.get(slot, elsewhere), min(before, tokens))
        return Held(by_slot, elsewhere)

    def note(self, slot: _S, prefix: Prefix, tokens: float, capacity_tokens: float | None) -> None:
        """Take note that a slot is going to compute a prompt, and to hold it then.

        Args:
            slot: Which.
            prefix: What the prompt begins with.
            tokens: Of the whole prompt.
            capacity_tokens: What the slot can hold in all; None if it is not known.
        """
        cache = self._caches.get(slot)
        if cache is None:
            cache = self._caches[slot] = _Cache()
        blocks, holders = cache.blocks, self._holders
        # From the end to the start: what is touched first is evicted first.
        for level in range(len(prefix.blocks), 0, -1):
            block = prefix.blocks[level - 1]
            if block in blocks:
                blocks.move_to_end(block)
                continue
            size = prefix.tokens_until(level, tokens) - prefix.tokens_until(level - 1, tokens)
            blocks[block] = size
            cache.tokens += size
            holders.setdefault(block, set()).add(slot)
        room = _UNKNOWN_CAPACITY if capacity_tokens is None else capacity_tokens
        while blocks and (cache.tokens > room or len(blocks) > _MOST_BLOCKS):
            block, size = blocks.popitem(last=False)
            cache.tokens -= size
            self._let_go(slot, block)

    def note_session(self, session: str, slot: _S, tokens: float) -> None:
        """Take note that a slot is going to hold a prompt of this conversation."""
        self._sessions[session] = (slot, tokens)
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def forget(self, slot: _S) -> None:
        """A slot holds nothing any more: its engine has begun anew."""
        cache = self._caches.pop(slot, None)
        for block in cache.blocks if cache is not None else ():
            self._let_go(slot, block)
        for session in [session for session, (known, _) in self._sessions.items() if known == slot]:
            del self._sessions[session]

    def _let_go(self, slot: _S, block: int) -> None:
        slots = self._holders[block]
        slots.discard(slot)
        if not slots:
            del self._holders[block]


class _Cache:
    """What one slot holds."""

    __slots__ = ("blocks", "tokens")

    def __init__(self) -> None:
        self.blocks: OrderedDict[int, float] = OrderedDict()
        """Tokens by block, the one to be evicted next first."""
        self.tokens = 0.0
