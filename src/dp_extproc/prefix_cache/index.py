"""The prefix index: which DP rank has the KV cache of which prefixes, estimated from the requests that it got.

Engines keep what they have computed for the next prompt with the same prefix. They evict what was unused for longest,
the ends of prompts first. The index does the same with the hashes of blocks, with the capacity that the engine reports.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Generic, TypeVar

from dp_extproc.prefix_cache.blocks import Prefix

_R = TypeVar("_R", bound=Hashable)

_UNKNOWN_CAPACITY: Final = 1 << 18
"""Tokens of KV cache that a rank is assumed to have until its engine reports them."""
_MOST_BLOCKS: Final = 1 << 14
"""Blocks of one rank: four million tokens in whole blocks."""
_MOST_BLOCKS_IN_ALL: Final = 1 << 21
"""Blocks of all ranks together, which take a gigabyte at most."""
_MOST_SESSIONS: Final = 100_000
"""Conversations that the index remembers."""
_LISTED: Final = 64
"""Ranks that a result lists at most. A prefix that more than half of all ranks have counts as one that all have."""


@dataclass(frozen=True, slots=True)
class CachedTokens(Generic[_R]):
    """The tokens of a prompt that ranks need not compute."""

    by_rank: Mapping[_R, float]
    """Cached tokens of the ranks that have the longest prefixes."""
    elsewhere: float
    """Cached tokens of every other rank: more than 0 for what nearly all of them have, such as a system prompt."""


class PrefixIndex(Generic[_R]):
    """The blocks that each rank has. A rank is whatever has a cache of its own: one DP rank of one endpoint."""

    def __init__(self) -> None:
        self._holders: dict[int, dict[_R, None]] = {}
        """The ranks that have each block, in the order in which they got it; the order of a set would be random."""
        self._caches: OrderedDict[_R, _Cache] = OrderedDict()
        """The cache of each rank, ordered from the one whose last request is oldest."""
        self._blocks = 0
        """Blocks of all ranks."""
        self._sessions: OrderedDict[str, _Session[_R]] = OrderedDict()
        self._shares: dict[_R, float] = {}
        """The share of the cached tokens that counts, of the ranks where it is not all."""

    def cached(self, prefix: Prefix, tokens: float, session: str | None = None) -> CachedTokens[_R]:
        """Return how much of a prompt of so many tokens each rank has cached.

        With a session, the client's name for a conversation, its last prompt counts as a prefix of this one, unless
        blocks show a longer one.
        """
        by_rank: dict[_R, float] = {}
        elsewhere = 0.0
        holders, known_ranks = self._holders, len(self._caches)
        # All levels are searched: an earlier prompt may end where this one has a cut, and lack the cuts before.
        for level, block in zip(range(len(prefix.blocks), 0, -1), reversed(prefix.blocks), strict=True):
            if (ranks := holders.get(block)) is None:
                continue
            share = prefix.tokens_in(level, tokens)
            if len(ranks) > _LISTED and 2 * len(ranks) > known_ranks:
                elsewhere = share
                break
            new = [rank for rank in ranks if rank not in by_rank] if by_rank else ranks
            by_rank.update(dict.fromkeys(islice(new, _LISTED - len(by_rank)), share))
            if len(by_rank) >= min(_LISTED, known_ranks):
                break  # all ranks that could have less are listed
        if session is not None and (known := self._sessions.get(session)) is not None:
            cache = self._caches[known.rank]
            if cache.recorded - known.recorded < cache.capacity:  # else later prompts have evicted it
                by_rank[known.rank] = max(by_rank.get(known.rank, elsewhere), min(known.tokens, tokens))
        if self._shares:
            by_rank = {rank: tokens * self._shares.get(rank, 1.0) for rank, tokens in by_rank.items()}
        return CachedTokens(by_rank, elsewhere)

    def trust(self, rank: _R, share: float) -> None:
        """Let only a share of what the index has of a rank count, because its engine finds no more."""
        if share < 1.0:
            self._shares[rank] = share
        else:
            self._shares.pop(rank, None)

    def share(self, rank: _R) -> float:
        """Return the share of a rank's cached tokens that counts."""
        return self._shares.get(rank, 1.0)

    def note(self, rank: _R, prefix: Prefix, tokens: float, capacity_tokens: float | None) -> None:
        """Record that a rank is going to compute a prompt of so many tokens, and to keep it in its cache.

        The capacity is the size of the rank's KV cache in tokens; None if it is not known.
        """
        cache = self._cache(rank)
        self._caches.move_to_end(rank)
        if capacity_tokens is not None:
            cache.capacity = capacity_tokens
        cache.recorded += tokens
        blocks, holders = cache.blocks, self._holders
        until = tokens
        # From the end to the start, because the block that is touched first is evicted first.
        for level in range(len(prefix.blocks), 0, -1):
            block = prefix.blocks[level - 1]
            before = prefix.tokens_in(level - 1, tokens) if level > 1 else 0.0
            if block in blocks:
                blocks.move_to_end(block)
            else:
                blocks[block] = until - before
                cache.tokens += until - before
                holders.setdefault(block, {})[rank] = None
                self._blocks += 1
            until = before
        while blocks and (cache.tokens > cache.capacity or len(blocks) > _MOST_BLOCKS):
            self._evict(rank, cache)
        while self._blocks > _MOST_BLOCKS_IN_ALL:
            oldest, cache = next(iter(self._caches.items()))
            if cache.blocks:
                self._evict(oldest, cache)
            else:
                self._caches.move_to_end(oldest)

    def note_session(self, session: str, rank: _R, tokens: float) -> None:
        """Record that a rank is going to have the last prompt of a conversation in its cache."""
        self._end_session(session)
        cache = self._cache(rank)
        cache.sessions.add(session)
        self._sessions[session] = _Session(rank, tokens, cache.recorded)
        if len(self._sessions) > _MOST_SESSIONS:
            self._end_session(next(iter(self._sessions)))

    def forget(self, rank: _R) -> None:
        """Drop all that a rank had: its engine has restarted."""
        self._shares.pop(rank, None)
        if (cache := self._caches.pop(rank, None)) is not None:
            for block in cache.blocks:
                self._drop(rank, block)
            for session in cache.sessions:
                del self._sessions[session]

    def _cache(self, rank: _R) -> "_Cache":
        if (cache := self._caches.get(rank)) is None:
            cache = self._caches[rank] = _Cache()
        return cache

    def _end_session(self, session: str) -> None:
        if (known := self._sessions.pop(session, None)) is not None:
            self._caches[known.rank].sessions.discard(session)

    def _evict(self, rank: _R, cache: "_Cache") -> None:
        block, size = cache.blocks.popitem(last=False)
        cache.tokens -= size
        self._drop(rank, block)

    def _drop(self, rank: _R, block: int) -> None:
        self._blocks -= 1
        ranks = self._holders[block]
        del ranks[rank]
        if not ranks:
            del self._holders[block]


@dataclass(frozen=True, slots=True)
class _Session(Generic[_R]):
    """The last prompt of a conversation."""

    rank: _R
    tokens: float
    recorded: float
    """Tokens of all prompts of the rank until then."""


@dataclass(slots=True)
class _Cache:
    """The estimated cache of one rank."""

    blocks: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """Tokens of each block, ordered from the one that is evicted next."""
    tokens: float = 0.0
    """Tokens of all blocks."""
    capacity: float = _UNKNOWN_CAPACITY
    """Tokens that fit in."""
    recorded: float = 0.0
    """Tokens of all prompts so far."""
    sessions: set[str] = field(default_factory=set)
    """The conversations whose last prompt the rank got."""
