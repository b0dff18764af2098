"""The prompt tokens that an aggregated engine computes per second while some wait on each of its ranks.

Such an engine computes prompts between the steps of decode, and its responses do not show when a prompt is done. Its
load pages show it: they count the tokens that were computed, and those that wait. Between two pages that both have
waiting tokens on all ranks the engine did as much as it can. While a rank is idle, it computes what arrives. If that
counted, each engine that an autoscaler adds would make all of them seem slower.
"""

from typing import Final

_SMOOTHING: Final = 0.1
"""Weight of the newest measurement in the mean. A page is read each second, and the parts of one step that fall on
either side of it make single measurements differ."""
_LEAST_SECONDS: Final = 0.1
"""Seconds between two pages below which the tokens of one step are no rate."""


class PromptRate:
    """Prompt tokens per second of one engine."""

    __slots__ = ("_before", "per_second")

    def __init__(self) -> None:
        self.per_second: float | None = None
        """None until tokens have waited for the time between two pages."""
        self._before: tuple[int, float] | None = None
        """The count and the time of the last page, if tokens waited then."""

    def learn(self, computed: int | None, *, waits: bool, at: float) -> None:
        """Learn from a page that was requested at a time.

        Args:
            computed: Tokens that the engine has computed since its start; None if the page has no such count.
            waits: Whether tokens wait on all ranks.
            at: The time in seconds.
        """
        before, self._before = self._before, (computed, at) if waits and computed is not None else None
        if before is None or self._before is None or computed is None:
            return
        tokens, seconds = computed - before[0], at - before[1]
        if tokens <= 0 or seconds < _LEAST_SECONDS:  # restarted, or stalled by decode
            return
        measured = tokens / seconds
        known = self.per_second
        self.per_second = measured if known is None else known + (measured - known) * _SMOOTHING
