"""Detects an engine whose scheduler hangs while its load page still answers.

Its requests wait and its published load does not change, for longer than the longest step of this engine takes. Such a
group of ranks is suspect: other ones are preferred, long before ``prefill_timeout``. It is no longer suspect at the
next page that has a newer load. Only pages with time stamps show this (SGLang from 0.5.13 on). Pages of earlier
releases come from the scheduler itself, so those of a hung one do not answer, and its samples grow stale.
"""

import math
from collections.abc import Sequence
from typing import Final

from dp_extproc.engines.model import EngineFacts, Mode
from dp_extproc.estimators.prefill_speed import ATTENTION_TOKENS, PrefillSpeed
from dp_extproc.estimators.progress import Progress
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.prefill import PrefillGroup
from dp_extproc.load.step_group import RankLoad, StepGroup

_LEAST_SECONDS: Final = 5.0
"""Seconds for which any scheduler may publish nothing: collection of garbage, new kernels, a busy machine."""
_LEAST_WITHOUT_STALLS: Final = 15.0
"""The same for releases that publish nothing while requests wait for the engine of the other leg."""
_PUBLISHED_STEPS: Final = 15
"""Decode steps between two publications: SGLang's default of ``--load-snapshot-publish-interval``."""


class StandstillDetector:
    """Watches the step groups of one endpoint."""

    __slots__ = ("_facts", "_groups", "_progress", "_publishes_stalls", "_speeds", "stuck")

    def __init__(
        self, groups: Sequence[StepGroup], speeds: Sequence[PrefillSpeed], facts: EngineFacts, *, publishes_stalls: bool
    ) -> None:
        """Begin without a suspect group.

        Args:
            groups: All step groups of the endpoint.
            speeds: The prefill speed of each group.
            facts: What its engine reports.
            publishes_stalls: Whether its load is published, too, while requests wait and no step runs.
        """
        self._groups = groups
        self._speeds = speeds
        self._facts = facts
        self._publishes_stalls = publishes_stalls
        self._progress = [Progress() for _ in groups]
        self.stuck: tuple[StepGroup, ...] = ()
        """The suspect groups, as of the last page."""

    def review(self, answered_at: float, asked_at: float, now: float) -> bool:
        """Compare a page that was just absorbed with the one before, and return whether other groups are suspect.

        Args:
            answered_at: When the engine had last computed a prompt. Of several groups it does not show which one did.
            asked_at: When the page was requested. A page that comes late shows no standstill since then.
            now: The present time.
        """
        stuck = []
        for group, speed, progress in zip(self._groups, self._speeds, self._progress, strict=True):
            since = self._waiting_since(group)
            progress.published(_published_at(group, now), now, is_busy=since is not None)
            if len(self._groups) == 1:
                progress.answered(answered_at)
            longest = self._longest_step(group, speed)
            if since is not None and progress.stands_still(since, longest, self._least, asked_at):
                stuck.append(group)
        before, self.stuck = self.stuck, tuple(stuck)
        return self.stuck != before

    @property
    def _least(self) -> float:
        return _LEAST_SECONDS if self._publishes_stalls else _LEAST_WITHOUT_STALLS

    def _waiting_since(self, group: StepGroup) -> float | None:
        """Return when the oldest request came that the scheduler has to work on; None if there is none."""
        if not self._publishes_stalls:
            if isinstance(group, PrefillGroup) and group.waits_for_decode:
                return None
            if isinstance(group, DecodeGroup) and not any(_runs(rank) for rank in group.ranks):
                return None  # its requests may wait for prefill
        return min((each.since for rank in group.ranks for each in rank.open), default=None)

    def _longest_step(self, group: StepGroup, speed: PrefillSpeed) -> float:
        """Return the expected seconds of the longest step; infinite while the engine's pace is unknown."""
        if isinstance(group, DecodeGroup):
            steps = math.inf if group.pace.reported is None else _PUBLISHED_STEPS * group.pace.reported
            is_decode = self._facts.mode is Mode.DECODE
            return steps if is_decode else max(steps, self._longest_prefill_step(group, speed.seconds_per_token))
        return self._longest_prefill_step(group, _seconds_per_token(group, speed))

    def _longest_prefill_step(self, group: StepGroup, per_token: float | None) -> float:
        if per_token is None:
            return math.inf
        longest = max(_longest_prompt(rank, self._facts.dp_ranks) for rank in group.ranks)
        tokens = self._facts.step_tokens if self._facts.chunked else max(longest, self._facts.step_tokens)
        return per_token * tokens * (1 + longest / ATTENTION_TOKENS)


def _seconds_per_token(group: StepGroup, speed: PrefillSpeed) -> float | None:
    """Return the engine's own count, or else what its responses show; None if it has computed no prompt yet."""
    if speed.seconds_per_token is None and isinstance(group, PrefillGroup) and group.tokens_per_second:
        return len(group.ranks) / group.tokens_per_second
    return speed.seconds_per_token


def _published_at(group: StepGroup, now: float) -> float:
    """Return the newest publication of a group. Without time stamps each page counts as one."""
    if any(rank.sample is not None and rank.sample.age is None for rank in group.ranks):
        return now
    return max(rank.sampled_at for rank in group.ranks)


def _runs(rank: RankLoad) -> bool:
    return rank.sample is not None and rank.sample.running_requests > 0


def _longest_prompt(rank: RankLoad, ranks: int) -> float:
    """Return a bound on the tokens that one step of a rank may compute without chunks, of an engine of so many ranks.

    Cached tokens count: later tokens attend to them, and the cache may have lost them. Prompts that were cancelled
    since the last publication count, too, because the engine may compute them all the same. Of a request whose rank the
    engine picks, any rank may have all. The waiting tokens of the last sample bound the prompts of other routers.
    """
    kept = (each for ones in (rank.open, rank.ended) for each in ones)
    own = max((each.tokens * (ranks if each.is_share else 1) for each in kept), default=0.0)
    return own if rank.sample is None else max(own, rank.group.tokens_in(rank.sample))
