"""How many tokens a text has: bytes divided by a ratio that corrects itself from the engines' own counts."""

from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Interval:
    """What lies between two counts of an engine."""

    seconds: float
    text_bytes: int
    """Answered."""
    tokens: int
    """Counted, less what was answered of those that came as tokens."""
    is_quiet: bool
    """Whether nothing of ours was there all the time."""
    is_of_ours: bool
    """Whether tokens of our texts may be among those counted."""
    is_clear: bool
    """Whether no page in it showed others, and pages of this engine hardly ever do."""


class _Engine:
    """What is known of one engine's counts."""

    __slots__ = (
        "_at", "_clear_for", "_count", "_had_text", "_idle_for", "_pages", "_pending", "_strange",
        "known_tokens", "text_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.text_bytes = 0
        """Answered since the last count ..."""
        self.known_tokens = 0
        """... and what came as tokens."""
        self._had_text = False
        """Whether some was answered before the last count: what belongs to it may be counted after."""
        self._count: int | None = None
        self._at = 0.0
        """Of the count."""
        self._idle_for = 0
        """Counts in succession, the last one included, at which nothing of ours was there."""
        self._pages = 0
        """Since the last count."""
        self._strange = _UNPROVEN
        """Share of the last pages that showed something of others."""
        self._clear_for = 0
        """Pages in succession, the last one included, that did not."""
        self._pending: deque[tuple[int, _Interval]] = deque()
        """What may be learned from when so many pages in succession have been clear."""

    def page(self, *, strangers: bool) -> list[_Interval]:
        """Note a page, and give what may be learned from now."""
        self._pages += 1
        self._strange += (strangers - self._strange) / _PAGES
        if strangers:
            self._clear_for = 0
            self._pending.clear()
        else:
            self._clear_for += 1
        clear = []
        while self._pending and self._pending[0][0] <= self._clear_for:
            clear.append(self._pending.popleft()[1])
        return clear

    def wait_until_clear(self, interval: _Interval) -> None:
        """Keep what may be learned from if no page of the next few shows others."""
        self._pending.append((self._clear_for + _CLEAR, interval))

    def count(self, prompt_tokens: int, at: float, *, idle: bool) -> _Interval | None:
        """Note a count. The first one ends nothing."""
        before, seconds, was_idle = self._count, at - self._at, self._idle_for > 0
        self._count, self._at = prompt_tokens, at
        self._idle_for = 0 if not idle or self.text_bytes or self.known_tokens else self._idle_for + 1
        interval = None
        if before is not None:
            counted = prompt_tokens - before if prompt_tokens >= before else prompt_tokens
            interval = _Interval(
                seconds=seconds,
                text_bytes=self.text_bytes,
                tokens=counted - self.known_tokens,
                # not the first idle reading, as the last prompt may be counted after it
                is_quiet=was_idle and self._idle_for > 0,
                is_of_ours=bool(self.text_bytes) or self._had_text,
                is_clear=self._clear_for >= self._pages and self._strange < _RARELY,
            )
        self._had_text = bool(self.text_bytes)
        self.text_bytes = self.known_tokens = self._pages = 0
        return interval


class _Quiet:
    """What engines count while they have nothing of ours: the traffic of others."""

    __slots__ = ("_seconds", "_tokens")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0

    def note(self, interval: _Interval) -> None:
        self._tokens += interval.tokens
        self._seconds += interval.seconds
        if self._seconds > _QUIET_MEMORY:
            self._fade(0.5)

    def use(self) -> float | None:
        """Give the tokens per second, which are known less well then; None if they are not known."""
        if self._seconds < QUIET_ENOUGH:
            return None
        rate = self._tokens / self._seconds
        self._fade(_FADING)
        return rate

    def _fade(self, left: float) -> None:
        self._tokens *= left
        self._seconds *= left


class TokenRatio:
    """Bytes per token of one pool's texts.

    What was answered, to us and to our peers, is set against what the engine counted, endpoint by endpoint and scrape
    by scrape. That the two are cut at slightly different moments evens out: every byte and every token is counted once
    in the end. Engines count for others, too. What they count while they have nothing of ours is taken off; where that
    is not known, nothing is learned while they show requests of others now and then, nor from shortly before.
    """

    __slots__ = ("_bytes", "_engines", "_quiet", "_tokens")

    def __init__(self) -> None:
        self._bytes = float(PRIOR_BYTES)
        self._tokens = PRIOR_BYTES / START
        self._engines: defaultdict[str, _Engine] = defaultdict(_Engine)
        self._quiet = _Quiet()

    @property
    def bytes_per_token(self) -> float:
        return min(MOST, max(LEAST, self._bytes / max(self._tokens, 1.0)))

    def forget_all_but(self, endpoints: Collection[str]) -> None:
        """Forget the counts of those that are configured no more."""
        for endpoint in self._engines.keys() - set(endpoints):
            del self._engines[endpoint]

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
        for clear in engine.page(strangers=strangers):
            self._learn(clear.text_bytes, clear.tokens)
        if prompt_tokens is None or (interval := engine.count(prompt_tokens, at, idle=idle)) is None:
            return
        if interval.is_quiet:
            self._quiet.note(interval)
        if not interval.is_of_ours:
            return  # traffic of others, or of known tokens alone
        if (others := self._quiet.use()) is not None:
            self._learn(interval.text_bytes, interval.tokens - others * interval.seconds)
        elif interval.is_clear:
            engine.wait_until_clear(interval)

    def _learn(self, text_bytes: int, tokens: float) -> None:
        self._bytes += text_bytes
        self._tokens += tokens
        if self._bytes > MEMORY_BYTES:
            self._bytes /= 2
            self._tokens /= 2
