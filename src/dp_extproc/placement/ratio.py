"""How many tokens a text has: bytes divided by a ratio that corrects itself from the engines' own counts."""

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


class TokenRatio:
    """Bytes per token of one pool's texts.

    What was answered is set against what the engine counted, endpoint by endpoint and scrape by scrape. That the two
    are cut at slightly different moments evens out: every byte and every token is counted once in the end.
    """

    __slots__ = ("_answered", "_bytes", "_counters", "_tokens")

    def __init__(self) -> None:
        self._bytes = float(PRIOR_BYTES)
        self._tokens = PRIOR_BYTES / START
        self._answered: dict[str, tuple[int, int]] = {}
        self._counters: dict[str, int] = {}

    @property
    def bytes_per_token(self) -> float:
        return min(MOST, max(LEAST, self._bytes / max(self._tokens, 1.0)))

    def estimate(self, prompt: Prompt) -> int:
        """Estimate the tokens of a prompt (of a batch: of all its prompts), at least 1."""
        return max(1, prompt.tokens + round(prompt.text_bytes / self.bytes_per_token))

    def answered(self, endpoint: str, prompt: Prompt) -> None:
        """Count a prompt that an engine has worked off."""
        text_bytes, tokens = self._answered.get(endpoint, (0, 0))
        self._answered[endpoint] = (text_bytes + prompt.text_bytes, tokens + prompt.tokens)

    def counted(self, endpoint: str, prompt_tokens: int) -> None:
        """Take in an engine's running count of prompt tokens. A count that went down began anew."""
        text_bytes, known_tokens = self._answered.pop(endpoint, (0, 0))
        before = self._counters.get(endpoint)
        self._counters[endpoint] = prompt_tokens
        if before is None or not text_bytes:
            return  # what is counted without a text of ours is the traffic of others, or of known tokens alone
        counted = prompt_tokens - before if prompt_tokens >= before else prompt_tokens
        self._bytes += text_bytes
        self._tokens += counted - known_tokens
        if self._bytes > MEMORY_BYTES:
            self._bytes /= 2
            self._tokens /= 2
