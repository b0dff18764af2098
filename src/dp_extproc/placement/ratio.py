"""How many tokens a text has: bytes divided by a ratio that corrects itself from the engines' own counts."""

from collections import defaultdict, deque
from typing import Final

from dp_extproc.request.prompt import Prompt

START: Final = 4.0
"""Bytes per token to begin with; see :mod:`dp_extproc.request.prompt` for why bytes, and the usual range."""
LEAST: Final = 1.0
MOST: Final = 8.0
"""Bounds that no tokenizer leaves on real text. They hold where counts mislead: traffic of others, cached prefixes."""
PRIOR_BYTES: Final = 64 << 10
"""Weight of the start value: so many bytes must have been counted for it to weigh no more than the counts."""
MEMORY_BYTES: Final = 16 << 20
"""After so many bytes old counts fade, so that a change of traffic shows."""
QUIET_ENOUGH: Final = 20.0
"""Seconds without a request of ours that tell what an engine counts without us."""
_QUIET_MEMORY: Final = 600.0
_FADING: Final = 0.99
"""What is left of the quiet seconds after each busy count: the traffic of others has its times, too."""


_RARELY: Final = 0.03
"""Share of an engine's pages that may show others for anything to be learned ..."""
_PAGES: Final = 30
"""... of about so many of the last ones. Others are not there at every moment at which an engine is read; but if they
count for a tenth of what it does, they are on every tenth page."""
_UNPROVEN: Final = 0.04
"""The share to begin with; it takes eight pages without others to come below."""
_CLEAR: Final = 8
"""Pages without others that have to come before something is learned: those who begin are not seen at once."""


class _Engine:
    """What is known of one engine's counts."""

    __slots__ = (
        "at", "clear_for", "count", "had_text", "idle_for", "known_tokens", "pages", "pending",
        "strange", "text_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.text_bytes = 0
        """Answered since the last count ..."""
        self.known_tokens = 0
        """... and what came as tokens."""
        self.had_text = False
        """Whether some was answered before the last count: what belongs to it may be counted after."""
        self.count: int | None = None
        self.at = 0.0
        """Of the count."""
        self.idle_for = 0
        """Counts in succession, the last one included, at which nothing of ours was there."""
        self.pages = 0
        """Since the last count."""
        self.strange = _UNPROVEN
        """Share of the last pages that showed something of others."""
        self.clear_for = 0
        """Pages in succession, the last one included, that did not."""
        self.pending: deque[tuple[int, int, int]] = deque()
        """Bytes and tokens that may be learned from when so many pages in succession have been clear."""


class TokenRatio:
    """Bytes per token of one pool's texts.

    What was answered, to us and to our peers, is set against what the engine counted, endpoint by endpoint and scrape
    by scrape. That the two are cut at slightly different moments evens out: every byte and every token is counted once
    in the end. Engines count for others, too. What they count while they have nothing of ours is taken off; where that
    is not known, nothing is learned while they show requests of others now and then, nor from shortly before.
    """

    __slots__ = ("_bytes", "_engines", "_quiet_seconds", "_quiet_tokens", "_tokens")

    def __init__(self) -> None:
        self._bytes = float(PRIOR_BYTES)
        self._tokens = PRIOR_BYTES / START
        self._engines: defaultdict[str, _Engine] = defaultdict(_Engine)
        self._quiet_seconds = 0.0
        self._quiet_tokens = 0.0

    @property
    def bytes_per_token(self) -> float:
        return min(MOST, max(LEAST, self._bytes / max(self._tokens, 1.0)))

    def estimate(self, prompt: Prompt) -> int:
        """Estimate the tokens of a prompt (of a batch: of all its prompts), at least 1."""
        return max(1, prompt.tokens + round(prompt.text_bytes / self.bytes_per_token))

    def answered(self, endpoint: str, text_bytes: int, known_tokens: int) -> None:
        """Count a prompt that an engine has worked off."""
        engine = self._engines[endpoint]
        engine.text_bytes += text_bytes
        engine.known_tokens += known_tokens

    def counted(
        self, endpoint: str, prompt_tokens: int | None, at: float, *, idle: bool = False, strangers: bool = False
    ) -> None:
        """Take in a page of an engine, with its running count of prompt tokens. A count that went down began anew.

        Args:
            endpoint: Whose.
            prompt_tokens: The count; None if the page does not tell it.
            at: When it was read.
            idle: Whether nothing of ours is there.
            strangers: Whether requests of others are.
        """
        engine = self._engines[endpoint]
        engine.pages += 1
        engine.strange += (strangers - engine.strange) / _PAGES
        engine.clear_for = 0 if strangers else engine.clear_for + 1
        if strangers:
            engine.pending.clear()
        while engine.pending and engine.pending[0][0] <= engine.clear_for:
            self._learn(*engine.pending.popleft()[1:])
        if prompt_tokens is None:
            return
        text_bytes, known_tokens = engine.text_bytes, engine.known_tokens
        before, seconds, pages, was_idle = engine.count, at - engine.at, engine.pages, engine.idle_for > 0
        is_of_ours = bool(text_bytes) or engine.had_text
        engine.text_bytes = engine.known_tokens = engine.pages = 0
        engine.had_text = bool(text_bytes)
        engine.count, engine.at = prompt_tokens, at
        engine.idle_for = 0 if not idle or text_bytes or known_tokens else engine.idle_for + 1
        if before is None:
            return
        counted = prompt_tokens - before if prompt_tokens >= before else prompt_tokens
        if was_idle and engine.idle_for:  # not the first idle reading, as the last prompt may be counted after it
            self._note_quiet(counted, seconds)
        if not is_of_ours:
            return  # traffic of others, or of known tokens alone
        if self._quiet_seconds >= QUIET_ENOUGH:
            off = seconds * self._quiet_tokens / self._quiet_seconds
            self._fade(_FADING)
            self._learn(text_bytes, counted - off - known_tokens)
        elif engine.clear_for >= pages and engine.strange < _RARELY:
            engine.pending.append((engine.clear_for + _CLEAR, text_bytes, counted - known_tokens))

    def _learn(self, text_bytes: int, tokens: float) -> None:
        self._bytes += text_bytes
        self._tokens += tokens
        if self._bytes > MEMORY_BYTES:
            self._bytes /= 2
            self._tokens /= 2

    def _note_quiet(self, tokens: int, seconds: float) -> None:
        self._quiet_tokens += tokens
        self._quiet_seconds += seconds
        if self._quiet_seconds > _QUIET_MEMORY:
            self._fade(0.5)

    def _fade(self, left: float) -> None:
        self._quiet_tokens *= left
        self._quiet_seconds *= left
