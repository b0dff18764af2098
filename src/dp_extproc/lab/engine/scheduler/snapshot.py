"""Publish the state of a rank as SGLang does: the snapshot behind /v1/loads and the gauges behind /metrics.

Both are as old as SGLang's are, which is the point (``managers/scheduler.py``, ``observability/metrics_reporter.py``):

- The snapshot is taken at the start of processing a prefill batch's result, of every 15th other step (idle batches of
  a rank beside busy peers count), every 50 ms while nothing runs, and when the group falls idle. Until 0.5.18 a rank
  that waits with queues for the other side publishes nothing.
- The counts of prefill steps follow the snapshot of their step. Releases differ in the steps that they count
  (``_record_step_counters``).
- The gauges follow the rank's *own* prefill batches and every 40th of its own decode steps. A rank that idles
  beside busy peers, or waits with full queues for the other side, keeps its last busy values; only once its whole
  group is idle and its queues are empty are they put right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from dp_extproc.lab.engine.scheduler.group import Batch
from dp_extproc.lab.engine.scheduler.hit_rate import WINDOW, HitRate
from dp_extproc.lab.engine.scheduler.rank import Rank, queued_tokens
from dp_extproc.lab.engine.scheduler.work import Role, Stage

PUBLISH_INTERVAL: Final = 15
"""SGLang's ``--load-snapshot-publish-interval``, in steps."""
STALL_REFRESH: Final = 0.05
"""Seconds, unscaled; ``LOAD_STALL_REFRESH_S`` in ``managers/scheduler.py``."""
IDLE_REFRESH: Final = 30.0
"""Seconds, unscaled, between reports of an idle scheduler."""
LONG_STEP: Final = 2.0
"""Seconds from which on a prefill step is not counted by 0.5.18 to 0.5.22 (``STEP_MAX_US``)."""
THROUGHPUT_STALENESS: Final = 30.0
"""Seconds, unscaled, after which prefill's reports no longer have the last output rate."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a rank at one moment; the names are those of /v1/loads."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_waiting_uncached_tokens: int
    num_used_tokens: int
    kv_evictable_tokens: int
    num_total_tokens: int
    num_active_tokens: int
    num_prealloc_ready_tokens: int
    max_total_num_tokens: int
    max_running_requests: int
    gen_throughput: float
    cache_hit_rate: float
    """Hit rate of the last prefill batch."""
    total_prefill_uncached_tokens: int
    total_prefill_busy_us: int
    decode_moments: tuple[float, ...] | None
    queues: Mapping[str, int]
    """Sequences per stage."""
    decode_sum_seq_lens: int
    reported_running: int
    """Running sequences in /metrics: on prefill the last batch."""

    @property
    def token_usage(self) -> float:
        """Return the share of the KV room that is used."""
        return self.num_used_tokens / self.max_total_num_tokens


@dataclass(slots=True)
class RankHistory:
    """The work of a rank since the start, and what it has published of it."""

    rank: Rank
    decode_log_interval: int = 40
    reports_last_batch: bool = True
    """Whether prefill reports its last batch as running; before 0.5.17 it reported the running batch, empty there."""
    estimates_hits: bool = True
    """Whether waiting tokens are discounted by the recent hit rate; until 0.5.18 all of them were reported. (Which
    prefix a waiting prompt will match is looked up by schedule policies other than SGLang's default, ``fcfs``.)"""
    keeps_statistics: bool = True
    """Whether rates are computed at all: with ``--enable-metrics`` only."""
    publishes_stalls: bool = True
    """Whether the snapshot is taken, too, while requests wait and no step runs; from 0.5.19 on."""
    counts_first_steps: bool = True
    """Whether prefill steps count that follow no other prefill step; not in 0.5.18 to 0.5.20."""
    counts_long_steps: bool = True
    """Whether prefill steps of :data:`LONG_STEP` count; not in 0.5.18 to 0.5.22."""
    time_scale: float = 1.0
    counted_since: float = 0.0
    """Start of the present output rate: at its last report, at first at the start."""
    published: Snapshot | None = None
    published_at: float = 0.0
    gauges: Snapshot | None = None
    gauges_at: float = 0.0
    last_batch: int = 0
    prefill_busy: float = 0.0
    """Seconds of the counted prefill steps, as long as they were."""
    prefill_tokens: int = 0
    """Tokens that the counted prefill steps have computed."""
    moments: list[float] = field(default_factory=lambda: [0.0] * 6)
    _batch_size: int = 0
    _steps: int = 0
    _decode_steps: int = 0
    _decode_tokens: int = 0
    _throughput: float = 0.0
    _last_throughput: float = 0.0
    _last_counts: bool = False
    """Whether the step before was one of prefill, without a pause since then."""
    _finished: tuple[int, float] | None = None
    """Tokens and seconds of the prefill step whose results are processed."""
    _batch_tokens: tuple[int, int] = (0, 0)
    """Tokens of the prefill batch that runs: found in the prefix cache, and to be computed."""
    _cached_before: int = 0
    _hit_rate: HitRate = field(init=False)

    def __post_init__(self) -> None:
        """Scale the window of the hit rate."""
        self._hit_rate = HitRate(WINDOW * self.time_scale)

    def begin_step(self, batch: Batch) -> None:
        """Note the next step of this rank, before its results change the queues."""
        if batch is Batch.PREFILL:
            self.last_batch = len(self.rank.chunks)
            found = self.rank.cached_tokens - self._cached_before
            self._batch_tokens, self._cached_before = (found, sum(self.rank.chunks.values())), self.rank.cached_tokens

    def finish_step(self, batch: Batch, seconds: float, now: float) -> None:
        """Count a step whose results are not processed yet.

        Args:
            batch: What the rank did in it.
            seconds: How long it took, unscaled.
            now: Its end.
        """
        self._steps += 1
        if batch is Batch.PREFILL:
            self._finished = (self._batch_tokens[1], seconds)
        elif batch is Batch.DECODE:
            size, micros = float(len(self.rank.decoding())), seconds * 1e6
            for position, value in enumerate((1, size, micros, size * size, size * micros, size)):
                self.moments[position] += value
            self._batch_size = int(size)
            self._decode_steps += 1
            self._decode_tokens += int(size)
        if batch is Batch.PREFILL or self._steps >= PUBLISH_INTERVAL:
            self._steps = 0
            self.publish(now)

    def report_batch(self, batch: Batch, now: float) -> None:
        """Count a prefill step, and refresh the gauges, after a step's results were processed, if it is time to."""
        self._count_prefill()
        if not self.keeps_statistics:
            return
        if batch is Batch.DECODE and self._decode_steps % self.decode_log_interval == 0:
            elapsed = now - self.counted_since
            self._throughput = self._last_throughput = self._decode_tokens / elapsed if elapsed > 0 else 0.0
            self.counted_since, self._decode_tokens = now, 0
            # The batch as it ran, with sequences that have finished in it: the next step removes those.
            self.gauges, self.gauges_at = replace(self.take(), reported_running=self._batch_size), now
        elif batch is Batch.PREFILL:
            is_recent = now - self.counted_since <= THROUGHPUT_STALENESS * self.time_scale
            self._throughput = self._last_throughput if is_recent else 0.0
            self._hit_rate.add(*self._batch_tokens, now)
            self.report(now)

    def _count_prefill(self) -> None:
        finished, self._finished = self._finished, None
        follows, self._last_counts = self._last_counts, finished is not None
        if finished is None or not (self.counts_first_steps or follows):
            return
        tokens, seconds = finished
        if self.counts_long_steps or seconds < LONG_STEP * self.time_scale:
            self.prefill_busy += seconds
            self.prefill_tokens += tokens

    def idle(self, now: float) -> None:
        """Do what an idle scheduler does; call it at any time, the more often the better."""
        self.last_batch = 0
        self._last_counts = False
        if now - self.published_at >= STALL_REFRESH * self.time_scale:
            self.fall_idle(now)
        if self.rank.queue or self.rank.inflight:
            return  # SGLang's on_idle returns before its report: the gauges freeze under back-pressure
        wrong = self.gauges is None or self.gauges.reported_running
        if wrong or now - self.gauges_at >= IDLE_REFRESH * self.time_scale:
            self._throughput = 0.0
            self.report(now)

    def fall_idle(self, now: float) -> None:
        """Take the snapshot of a rank without a step, if its release takes one."""
        if self.rank.is_empty or self.publishes_stalls:
            self.publish(now)

    def publish(self, now: float) -> None:
        """Take the snapshot behind /v1/loads."""
        self.published, self.published_at = self.take(), now

    def report(self, now: float) -> None:
        """Set the gauges behind /metrics."""
        self.gauges, self.gauges_at = self.take(), now

    def take(self) -> Snapshot:
        """Take a snapshot of the rank."""
        rank = self.rank
        stages = dict.fromkeys(Stage, 0)
        for work in rank.works():
            stages[work.stage] += 1
        on_decode = rank.role is Role.DECODE
        unfinished = sum(work.prompt_tokens - work.prefilled for work in rank.running)
        in_transfer = queued_tokens(rank, Stage.TRANSFER) if on_decode else 0
        waiting = [] if on_decode else [work.prompt_tokens for work in rank.queued(Stage.WAITING)]
        uncached_share = 1.0 - (self._hit_rate.recent if self.estimates_hits else 0.0)
        total = rank.used + sum(waiting) + queued_tokens(rank, Stage.BOOTSTRAP, Stage.PREALLOC)
        reported = self.last_batch if self.reports_last_batch else 0
        ready = [work for work in rank.queued(Stage.PREALLOC) if work.reachable]
        return Snapshot(
            num_running_reqs=0 if rank.role is Role.PREFILL else len(rank.running),
            num_waiting_reqs=len(rank.queue),
            num_waiting_uncached_tokens=sum(int(tokens * uncached_share) for tokens in waiting)
            + (0 if on_decode else unfinished),
            num_used_tokens=rank.used,
            kv_evictable_tokens=rank.cache.evictable,
            num_total_tokens=total,
            num_active_tokens=total - in_transfer,
            num_prealloc_ready_tokens=sum(work.prompt_tokens for work in ready),
            max_total_num_tokens=rank.limits.capacity,
            max_running_requests=rank.limits.max_running,
            gen_throughput=round(self._throughput, 2),
            cache_hit_rate=self._hit_rate.last,
            total_prefill_uncached_tokens=self.prefill_tokens,
            total_prefill_busy_us=round(self.prefill_busy * 1e6),
            decode_moments=None if rank.role is Role.PREFILL else tuple(self.moments),
            queues={str(stage): count for stage, count in stages.items()} | {"prealloc_ready": len(ready)},
            decode_sum_seq_lens=sum(work.context for work in rank.decoding()),
            reported_running=reported if rank.role is Role.PREFILL else len(rank.running),
        )
