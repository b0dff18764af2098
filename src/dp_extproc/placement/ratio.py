"""How many tokens a text has: bytes divided by a ratio that corrects itself from the engines' own counts."""

from typing import Final

from msgspec import Struct

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


class _Count(Struct, frozen=True):
    """A reading of an engine's counter."""

    tokens: int
    at: float
    idle_for: int
    """Readings in succession, this one included, at which nothing of ours was there."""
    strangers: bool


class TokenRatio:
    """Bytes per token of one pool's texts.

    What was answered, to us and to our peers, is set against what the engine counted, endpoint by endpoint and scrape
    by scrape. That the two are cut at slightly different moments evens out: every byte and every token is counted once
    in the end. Engines count for others, too. What they count while they have nothing of ours is taken off; where that
    is not known, nothing is learned while they show requests of others.
    """

    __slots__ = ("_answered", "_bytes", "_counts", "_quiet_seconds", "_quiet_tokens", "_tokens")

    def __init__(self) -> None:
        self._bytes = float(PRIOR_BYTES)
        self._tokens = PRIOR_BYTES / START
        self._answered: dict[str, tuple[int, int]] = {}
        self._counts: dict[str, _Count] = {}
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
        before = self._answered.get(endpoint, (0, 0))
        self._answered[endpoint] = (before[0] + text_bytes, before[1] + known_tokens)

    def counted(
        self, endpoint: str, prompt_tokens: int, at: float, *, idle: bool = False, strangers: bool = False
    ) -> None:
        """Take in an engine's running count of prompt tokens. A count that went down began anew.

        Args:
            endpoint: Whose.
            prompt_tokens: The count.
            at: When it was read.
            idle: Whether nothing of ours is there.
            strangers: Whether requests of others are.
        """
        text_bytes, known_tokens = self._answered.pop(endpoint, (0, 0))
        before = self._counts.get(endpoint)
        idle_for = 0 if not idle or text_bytes or known_tokens else 1 if before is None else before.idle_for + 1
        self._counts[endpoint] = _Count(prompt_tokens, at, idle_for, strangers)
        if before is None:
            return
        counted = prompt_tokens - before.tokens if prompt_tokens >= before.tokens else prompt_tokens
        if before.idle_for and idle_for:  # not the first idle reading, as the last prompt may be counted after it
            self._note_quiet(counted, at - before.at)
        if not text_bytes:
            return  # traffic of others, or of known tokens alone
        if self._quiet_seconds >= QUIET_ENOUGH:
            counted -= round((at - before.at) * self._quiet_tokens / self._quiet_seconds)
            self._fade(_FADING)
        elif strangers or before.strangers:
            return
        self._bytes += text_bytes
        self._tokens += max(0, counted - known_tokens)
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
