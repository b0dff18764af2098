"""Choose the DP rank of a request as SGLang's ``managers/data_parallel_controller.py`` does, by release. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from dp_extproc.lab.engine.leg import Leg, RefusedError
from dp_extproc.lab.engine.scheduler.rank import Rank
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import EngineKind, Settings


class EngineKilledError(Exception):
    """An exception in the controller's loop: it has no guard per request, so the whole engine ends (SIGQUIT)."""


@dataclass(slots=True)
class Controller:
    """Choose the ranks of one engine."""

    settings: Settings
    _next: int = 0

    def check(self, leg: Leg) -> None:
        """Check what the HTTP process checks before anything is sent to the controller.

        Raises:
            RefusedError: The rank is out of range. Until 0.5.9 nothing looked.
        """
        rank, ranks = leg.routed_dp_rank, self.settings.dp_size
        if self.settings.release.routes_by_field and rank is not None and not 0 <= rank < ranks:
            if self.settings.kind is EngineKind.VLLM:
                raise RefusedError(f"data_parallel_rank {rank} is out of range [0, {ranks}).")
            raise RefusedError(f"routed_dp_rank={rank} out of range [0, {ranks})")

    def check_shape(self, leg: Leg) -> None:
        """Check a leg that the HTTP process let through as the scheduler processes do.

        Raises:
            ServerKilledError: It raises there.
        """
        if self.settings.role is Role.DECODE and leg.bootstrap_room is not None and leg.bootstrap_host is None:
            raise EngineKilledError("AttributeError: 'NoneType' object has no attribute 'startswith' (bootstrap_host)")

    def choose(self, leg: Leg, ranks: Sequence[Rank]) -> int:
        """Choose the rank of a leg.

        Raises:
            ServerKilledError: The request makes the controller raise.
        """
        size = len(ranks)
        if size == 1:
            return 0  # there is no controller
        if leg.routed_dp_rank is not None:
            return self._given(leg.routed_dp_rank, size)
        if self.settings.kind is EngineKind.VLLM:
            return _least_busy(ranks)
        if self.settings.follows_rooms:
            return self._by_room(leg, size)
        if self.settings.method in {"total_requests", "total_tokens"}:
            return self._least_loaded(ranks)
        chosen = self._next
        self._next = (chosen + 1) % size
        return chosen

    def _given(self, rank: int, size: int) -> int:
        if not -size <= rank < size:
            raise EngineKilledError(f"IndexError: list index out of range (data_parallel_rank={rank}, {size} workers)")
        return rank % size

    def _by_room(self, leg: Leg, size: int) -> int:
        if leg.bootstrap_room is None:
            raise EngineKilledError("AssertionError: req.bootstrap_room is not None")
        return leg.bootstrap_room % size

    def _least_loaded(self, ranks: Sequence[Rank]) -> int:
        def load(rank: Rank) -> tuple[int, int]:
            works = list(rank.works())
            tokens = sum(work.context for work in works) if self.settings.method == "total_tokens" else 0
            return tokens, len(works)

        return min(ranks, key=load).dp_rank


def _least_busy(ranks: Sequence[Rank]) -> int:
    """Choose as vLLM's ``DPLBAsyncMPClient`` does: four times the waiting requests, plus the running ones."""

    def score(rank: Rank) -> int:
        running = len(rank.running)
        return 4 * (len(list(rank.works())) - running) + running

    return min(ranks, key=score).dp_rank


def conflict(leg: Leg, dp_rank: int, settings: Settings) -> str | None:
    """Describe how a prefill rank and a room disagree, if this release checks it (``disaggregation/common/conn.py``).

    The check uses the attention-DP rank only: with plain DP that is 0 in every replica.
    """
    if leg.bootstrap_room is None or not (settings.follows_rooms and settings.release.checks_room_conflict):
        return None
    if settings.force_query:
        return None
    if leg.disagg_prefill_dp_rank is not None and settings.release.explicit_rank_skips_conflict_check:
        return None
    seen = dp_rank if settings.dp_attention else 0
    implied = leg.bootstrap_room % settings.dp_size
    if seen == implied:
        return None
    return (
        f"follow_bootstrap_room conflict: dispatched to dp_rank {seen} but bootstrap_room {leg.bootstrap_room} implies "
        f"dp_rank {implied}. Set SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK=1 to allow mixed routing."
    )
