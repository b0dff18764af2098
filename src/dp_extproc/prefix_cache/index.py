"""Who holds the KV cache of which prompts' beginnings, as far as it can be known from what was sent where. Pure.

Engines keep what they have computed for the next prompt with the same beginning, and evict what was not used for
longest, leaves first. The index does the same with hashes, slot by slot, with the capacity that the engine tells.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, Generic, TypeVar

from dp_extproc.prefix_cache.blocks import Prefix

_S = TypeVar("_S", bound=Hashable)

_UNKNOWN_CAPACITY: Final = 1 << 18
"""Tokens that a slot is taken to hold until its engine tells."""
_MOST_BLOCKS: Final = 1 << 14
"""Per slot; four million tokens in whole blocks."""
_MOST_BLOCKS_IN_ALL: Final = 1 << 21
"""Of all slots together: at most a gigabyte, in a fleet that fills it."""
_MOST_SESSIONS: Final = 100_000
_LISTED: Final = 64
"""Slots that an answer lists at most. A beginning that more than half of all hold is taken to be held by all."""


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
        self._holders: dict[int, dict[_S, None]] = {}
        """By block, in the order in which they began to hold it; that of a set would be chance."""
        self._caches: OrderedDict[_S, _Cache] = OrderedDict()
        """By slot, the one that was sent nothing for longest first."""
        self._blocks = 0
        """Of all slots."""
        self._sessions: OrderedDict[str, _Session[_S]] = OrderedDict()

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
        holders, known_slots = self._holders, len(self._caches)
        # Every level has to be looked at: an earlier prompt may end where this one has a cut, and lack those before.
        for level, block in zip(range(len(prefix.blocks), 0, -1), reversed(prefix.blocks), strict=True):
            if (slots := holders.get(block)) is None:
                continue
            share = prefix.tokens_in(level, tokens)
            if len(slots) > _LISTED and 2 * len(slots) > known_slots:
                elsewhere = share
                break
            new = [slot for slot in slots if slot not in by_slot] if by_slot else slots
            by_slot.update(dict.fromkeys(islice(new, _LISTED - len(by_slot)), share))
            if len(by_slot) >= min(_LISTED, known_slots):
                break  # whoever could hold less is listed
        if session is not None and (known := self._sessions.get(session)) is not None:
            cache = self._caches[known.slot]
            if cache.noted - known.noted < cache.capacity:  # else others have pushed it out since
                by_slot[known.slot] = max(by_slot.get(known.slot, elsewhere), min(known.tokens, tokens))
        return Held(by_slot, elsewhere)

    def note(self, slot: _S, prefix: Prefix, tokens: float, capacity_tokens: float | None) -> None:
        """Take note that a slot is going to compute a prompt, and to hold it then.

        Args:
            slot: Which.
            prefix: What the prompt begins with.
            tokens: Of the whole prompt.
            capacity_tokens: What the slot can hold in all; None if it is not known.
        """
        cache = self._cache(slot)
        self._caches.move_to_end(slot)
        if capacity_tokens is not None:
            cache.capacity = capacity_tokens
        cache.noted += tokens
        blocks, holders = cache.blocks, self._holders
        until = tokens
        # From the end to the start: what is touched first is evicted first.
        for level in range(len(prefix.blocks), 0, -1):
            block = prefix.blocks[level - 1]
            before = prefix.tokens_in(level - 1, tokens) if level > 1 else 0.0
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = until - before
                cache.tokens += until - before
                holders.setdefault(block, {})[slot] = None
                self._blocks += 1
            until = before
        while blocks and (cache.tokens > cache.capacity or len(blocks) > _MOST_BLOCKS):
            self._evict(slot, cache)
        while self._blocks > _MOST_BLOCKS_IN_ALL:
            idle, its = next(iter(self._caches.items()))
            if its.blocks:
                self._evict(idle, its)
            else:
                self._caches.move_to_end(idle)

    def note_session(self, session: str, slot: _S, tokens: float) -> None:
        """Take note that a slot is going to hold a prompt of this conversation."""
        self._end_session(session)
        cache = self._cache(slot)
        cache.sessions.add(session)
        self._sessions[session] = _Session(slot, tokens, cache.noted)
        if len(self._sessions) > _MOST_SESSIONS:
            self._end_session(next(iter(self._sessions)))

    def forget(self, slot: _S) -> None:
        """A slot holds nothing any more: its engine has begun anew."""
        cache = self._caches.pop(slot, None)
        if cache is not None:
            for block in cache.blocks:
                self._let_go(slot, block)
            for session in cache.sessions:
                del self._sessions[session]

    def _cache(self, slot: _S) -> "_Cache":
        cache = self._caches.get(slot)
        if cache is None:
            cache = self._caches[slot] = _Cache()
        return cache

    def _end_session(self, session: str) -> None:
        if (known := self._sessions.pop(session, None)) is not None:
            self._caches[known.slot].sessions.discard(session)

    def _evict(self, slot: _S, cache: "_Cache") -> None:
        block, size = cache.blocks.popitem(last=False)
        cache.tokens -= size
        self._let_go(slot, block)

    def _let_go(self, slot: _S, block: int) -> None:
        self._blocks -= 1
        slots = self._holders[block]
        del slots[slot]
        if not slots:
            del self._holders[block]


@dataclass(frozen=True, slots=True)
class _Session(Generic[_S]):
    """The last prompt of a conversation."""

    slot: _S
    tokens: float
    noted: float
    """What had been sent to the slot by then."""


class _Cache:
    """What one slot holds."""

    __slots__ = ("blocks", "capacity", "noted", "sessions", "tokens")

    def __init__(self) -> None:
        self.blocks: OrderedDict[int, float] = OrderedDict()
        """Tokens by block, the one to be evicted next first."""
        self.tokens = 0.0
        self.capacity: float = _UNKNOWN_CAPACITY
        self.noted = 0.0
        """Tokens ever sent to the slot."""
        self.sessions: set[str] = set()
