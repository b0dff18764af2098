"""How true the prefix index is of one engine: the cached tokens that it expected, and those that the engine counted.

Engines count the prompt tokens of all their requests, and how many of these they had cached (``/metrics``). The index
expects cached tokens for each prompt before it is computed. So the two sums are compared, page by page, without a look
at any response. An engine that evicts sooner than the index supposes has found fewer tokens, and one that was flushed
none.
"""

import math
from dataclasses import dataclass
from typing import Final

_HALF_LIFE: Final = 300.0
"""Seconds after which what was compared counts for a half. So a flushed cache is trusted again after some minutes."""
_WINDOW: Final = 30.0
"""Seconds of counts that are compared at a time, or until the engine computes nothing. A page and the responses of the
prompts that it counts come at slightly different times."""
_PRIOR: Final = 20_000.0
"""Tokens that are taken as expected and found before anything is compared: a few long prompts."""
_NEARLY: Final = 0.85
"""Share found from which on the expectation is true. Estimates of prompt lengths are wrong by as much."""
_LEAST_SHARE: Final = 0.05
"""Bound on the share, so that what was expected can be computed from what was credited."""
_FLUSHED_SHARE: Final = 0.05
"""Share found in a window below which the cache is empty."""
_FLUSHED_TOKENS: Final = 20_000.0
"""Expected tokens in a window from which on that is concluded."""


@dataclass(slots=True)
class _Window:
    """What is compared at a time, in tokens."""

    since: float = -math.inf
    ours: float = 0.0
    """Prompts of this replica and its peers."""
    expected: float = 0.0
    """The part of them that was expected in cache."""
    prompt: float = 0.0
    """All prompts that the engine has counted."""
    cached: float = 0.0
    """The part of them that it had in cache."""


class PrefixTruth:
    """The cached tokens that were expected of one engine, and those that it found."""

    __slots__ = ("_at", "_before", "_expected", "_found", "_window", "expected", "found")

    def __init__(self) -> None:
        self.expected = 0.0
        """Cached tokens that the index expected, of all prompts that were compared."""
        self.found = 0.0
        """Cached tokens that the engine found in these prompts."""
        self._window = _Window()
        self._before: tuple[int, int] | None = None
        """Prompt tokens and cached tokens by the last page."""
        self._expected = 0.0
        self._found = 0.0
        """Both sums, of which older parts count less."""
        self._at = -math.inf

    def computed(self, prompt: float, expected: float) -> None:
        """Note a prompt of so many tokens that the engine has computed, and how many of them were expected in cache."""
        self._window.ours += prompt
        self._window.expected += min(expected, prompt)

    def counted(self, prompt: int, cached: int, at: float) -> bool:
        """Compare the engine's counts since its start with what was expected, at a time in seconds.

        Prompts of other routers are among the counts. Their part of the cached tokens is supposed to be that of ours.

        Returns:
            Whether the engine seems to have had an empty cache.
        """
        before, self._before = self._before, (prompt, cached)
        if before is None or prompt < before[0] or cached < before[1]:
            self._window = _Window(since=at)
            return False
        window = self._window
        window.prompt += prompt - before[0]
        window.cached += cached - before[1]
        if prompt > before[0] and at - window.since < _WINDOW:
            return False
        self._window = _Window(since=at)
        if not window.ours or not window.prompt:
            return False
        expected, found = window.expected, window.cached * min(1.0, window.ours / window.prompt)
        self.expected += expected
        self.found += found
        faded = 0.5 ** ((at - self._at) / _HALF_LIFE)
        self._expected, self._found, self._at = self._expected * faded + expected, self._found * faded + found, at
        return expected >= _FLUSHED_TOKENS and found < _FLUSHED_SHARE * expected

    def share(self, now: float) -> float:
        """Return the share of the expected tokens that the engine is supposed to find, at most 1."""
        faded = 0.5 ** ((now - self._at) / _HALF_LIFE)
        share = (self._found * faded + _PRIOR) / (self._expected * faded + _PRIOR)
        return 1.0 if share >= _NEARLY else max(_LEAST_SHARE, share)
