"""Estimate of the tokens of a text: its bytes divided by a ratio that is learned from the engines' counts."""

from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from dp_extproc.request.prompt import Prompt

START: Final = 4.0
"""Bytes per token before anything is learned. :mod:`dp_extproc.request.prompt` has the usual range."""
LEAST: Final = 1.0
MOST: Final = 8.0
"""Bytes per token, between which all tokenizers stay on real text. The bounds hold where counts mislead, such as by
external traffic."""
PRIOR_BYTES: Final = 64 << 10
"""Weight of the start value, in bytes: after so many counted bytes it weighs no more than the counts."""
MEMORY_BYTES: Final = 16 << 20
"""Bytes after which old counts fade, so that the ratio follows a change of traffic."""
QUIET_ENOUGH: Final = 20.0
"""Seconds without reservations after which the rate of external tokens is used."""
_QUIET_MEMORY: Final = 600.0
"""Seconds without reservations after which older ones count for a half."""
_FADING: Final = 0.99
"""Factor of the quiet seconds at each use of their rate, because external traffic changes, too."""
_RARELY: Final = 0.03
"""Share of an engine's last pages with external requests above which nothing is learned from its counts."""
_PAGES: Final = 30
"""Pages over which that share is averaged. A page shows external requests only of its own moment; but if they are a
tenth of an engine's work, they are on every tenth page."""
_UNPROVEN: Final = 0.04
"""The share before the first page; eight pages without external requests bring it below the limit."""
_CLEAR: Final = 8
"""Pages without external requests that must follow before a count is used: a page may miss requests that have begun."""


@dataclass(frozen=True, slots=True)
class _Interval:
    """The time between two counts of an engine."""

    seconds: float
    text_bytes: int
    """Bytes of texts whose prompts were computed."""
    tokens: int
    """Counted tokens, less those of computed prompts that came as token ids."""
    is_quiet: bool
    """Whether there was no reservation all the time."""
    is_of_ours: bool
    """Whether tokens of known texts may be among those counted."""
    is_clear: bool
    """Whether no page in it has external requests, and few other pages of this engine have some."""
    is_doubtful: bool
    """Whether tokens of media may be among those counted, of which no exact number is known."""


@dataclass(slots=True)
class _Engine:
    """The counts of one engine."""

    text_bytes: int = 0
    """Bytes of texts whose prompts were computed since the last count."""
    known_tokens: int = 0
    """Tokens of prompts that came as token ids and were computed since the last count."""
    _had_text: bool = False
    """Whether texts were computed before the last count: their tokens may be counted after it."""
    _is_doubtful: bool = False
    """Whether prompts with media were computed since the last count."""
    _was_doubtful: bool = False
    """Whether such prompts were computed before it: their tokens may be counted after it."""
    _count: int | None = None
    """The last count of prompt tokens."""
    _at: float = 0.0
    """When it was read."""
    _idle_for: int = 0
    """Counts in succession, up to the last one, without a reservation."""
    _pages: int = 0
    """Pages since the last count."""
    _external_share: float = _UNPROVEN
    """Share of the last pages that have external requests."""
    _clear_for: int = 0
    """Pages in succession, up to the last one, without external requests."""
    _pending: deque[tuple[int, _Interval]] = field(default_factory=deque)
    """Intervals, each with the number of clear pages in succession after which it is used."""

    def note_page(self, *, external: bool | None) -> list[_Interval]:
        """Note a page, and return the intervals that may be used now. A doubtful page (None) has no effect."""
        if external is None:
            return []
        self._pages += 1
        self._external_share += (external - self._external_share) / _PAGES
        if external:
            self._clear_for = 0
            self._pending.clear()
        else:
            self._clear_for += 1
        clear = []
        while self._pending and self._pending[0][0] <= self._clear_for:
            clear.append(self._pending.popleft()[1])
        return clear

    def wait_until_clear(self, interval: _Interval) -> None:
        """Keep an interval until a number of pages without external requests have followed."""
        self._pending.append((self._clear_for + _CLEAR, interval))

    def note_doubt(self, *, doubtful: bool) -> None:
        """Note whether a computed prompt has tokens whose number is only estimated."""
        self._is_doubtful = self._is_doubtful or doubtful

    def note_count(self, prompt_tokens: int, at: float, *, idle: bool) -> _Interval | None:
        """Note a count, and return the interval that it ends; None for the first one."""
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
                # not at the first idle count, as the last prompt may be counted after it
                is_quiet=was_idle and self._idle_for > 0,
                is_of_ours=bool(self.text_bytes) or self._had_text,
                is_doubtful=self._is_doubtful or self._was_doubtful,
                is_clear=self._clear_for >= self._pages and self._external_share < _RARELY,
            )
        self._had_text = bool(self.text_bytes)
        self._was_doubtful, self._is_doubtful = self._is_doubtful, False
        self.text_bytes = self.known_tokens = self._pages = 0
        return interval


@dataclass(slots=True)
class _Quiet:
    """What engines count without reservations: external traffic."""

    _seconds: float = 0.0
    _tokens: float = 0.0

    def note(self, interval: _Interval) -> None:
        self._tokens += interval.tokens
        self._seconds += interval.seconds
        if self._seconds > _QUIET_MEMORY:
            self._fade(0.5)

    def use_rate(self) -> float | None:
        """Return the external tokens per second, whose weight each use lowers; None if too little was counted."""
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

    The bytes of computed prompts, of this replica and its peers, are compared with the tokens that the engine counted,
    endpoint by endpoint and page by page. The two end at slightly different moments, which evens out: in the end every
    byte and every token is counted once. Engines count external requests, too. The rate at which they count without
    reservations is subtracted. While it is not known, nothing is learned from engines with external requests on their
    pages, nor from shortly before.
    """

    def __init__(self) -> None:
        self._bytes = float(PRIOR_BYTES)
        self._tokens = PRIOR_BYTES / START
        self._engines: defaultdict[str, _Engine] = defaultdict(_Engine)
        self._quiet = _Quiet()

    @property
    def bytes_per_token(self) -> float:
        return min(MOST, max(LEAST, self._bytes / max(self._tokens, 1.0)))

    def forget_all_but(self, endpoints: Collection[str]) -> None:
        """Drop the counts of endpoints that are no longer configured."""
        for endpoint in self._engines.keys() - set(endpoints):
            del self._engines[endpoint]

    def estimate(self, prompt: Prompt) -> int:
        """Estimate the tokens of a prompt (of a batch: of all its prompts), at least 1."""
        return max(1, prompt.tokens + round(prompt.text_bytes / self.bytes_per_token))

    def computed(self, endpoint: str, text_bytes: int, known_tokens: int, *, doubtful: bool = False) -> None:
        """Count a prompt that an engine has computed. If its tokens are *doubtful*, two counts teach nothing."""
        engine = self._engines[endpoint]
        engine.note_doubt(doubtful=doubtful)
        engine.text_bytes += text_bytes
        engine.known_tokens += known_tokens

    def counted(
        self, endpoint: str, prompt_tokens: int | None, at: float, *, idle: bool = False, external: bool | None = False
    ) -> None:
        """Learn from a page that was read at *at*, with its running count of prompt tokens. A lower count began anew.

        The endpoint is named by its URL. It is *idle* without a reservation; *external* are requests without one,
        None if that is doubtful.
        """
        engine = self._engines[endpoint]
        for clear in engine.note_page(external=external):
            self._learn(clear.text_bytes, clear.tokens)
        if prompt_tokens is None or (interval := engine.note_count(prompt_tokens, at, idle=idle)) is None:
            return
        if interval.is_quiet:
            self._quiet.note(interval)
        if interval.is_doubtful or not interval.is_of_ours:
            return  # external traffic, or token ids alone
        if (rate := self._quiet.use_rate()) is not None:
            self._learn(interval.text_bytes, interval.tokens - rate * interval.seconds)
        elif interval.is_clear:
            engine.wait_until_clear(interval)

    def _learn(self, text_bytes: int, tokens: float) -> None:
        self._bytes += text_bytes
        self._tokens += tokens
        if self._bytes > MEMORY_BYTES:
            self._bytes /= 2
            self._tokens /= 2
