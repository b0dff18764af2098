"""Serve ``/metrics``: gauges per rank, as stale as SGLang's; counters and histograms without ranks."""

import os
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from dp_extproc.lab.engine.api.pages import utilization
from dp_extproc.lab.engine.api.request_metrics import RequestMetrics
from dp_extproc.lab.engine.engine import Engine
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory, Snapshot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_WITHOUT_THE_FEATURE: Final = (
    "is_cuda_graph", "mamba_available_tokens", "mamba_evictable_tokens", "mamba_usage", "mamba_used_tokens",
    "num_decode_deferred_kv_release_reqs", "num_decode_host_receive_queue_reqs", "num_grammar_queue_reqs",
    "num_unique_running_routing_keys", "prealloc_swa_token_usage", "spec_accept_length", "spec_accept_rate",
    "spec_block_accept_length", "spec_cap_length", "spec_num_draft_tokens", "spec_num_steps", "swa_available_tokens",
    "swa_evictable_tokens", "swa_token_usage", "swa_used_tokens",
)  # fmt: skip
"""Gauges that 0.5.23 exports as 0 on engines without the feature that they belong to."""


class Metrics(Collector):
    """The page of one engine."""

    def __init__(self, engine: Engine) -> None:
        """Register the series of *engine*."""
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._model = {"model_name": engine.settings.model, "engine_type": str(engine.settings.role)}
        labels = [self._labels(history, 0) for history in engine.histories]
        self.requests = RequestMetrics(engine.settings, self._registry, labels)

    def page(self) -> bytes:
        """Write the page."""
        self._engine.refresh()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Return the series of the schedulers."""
        ranks = self._engine.histories
        first = [(self._labels(history, 0), history) for history in ranks]
        every = [
            (self._labels(history, attn_tp_rank), history)
            for history in ranks
            for attn_tp_rank in range(self._engine.settings.attn_tp_size)
        ]
        # Constants come from all tensor-parallel ranks, everything else from the first of each DP rank.
        if self._engine.settings.release.since("0.5.6"):
            capacity = "Maximum total number of tokens in the KV cache pool."
            yield _gauge(
                "max_total_num_tokens", capacity, ((at, history.rank.limits.capacity) for at, history in every)
            )
        page_size = self._engine.settings.page_size
        yield _gauge("page_size", "Page size.", ((at, page_size) for at, _ in every))
        if self._engine.settings.release.since("0.5.23"):
            pages = [(at, history.rank.limits.capacity // page_size) for at, history in every]
            yield _gauge("num_pages", "Number of KV cache pages.", pages)
            length = self._engine.settings.context_length
            yield _gauge("context_len", "Maximum context length.", ((at, length) for at, _ in every))
            for name in _WITHOUT_THE_FEATURE:
                yield _gauge(name, "Of something that this server has not.", ((at, 0) for at, _ in first))
        names = _gauges(self._engine, ranks[0]) if ranks else {}
        values = [(at, _gauges(self._engine, history)) for at, history in first]
        for name in names:
            yield _gauge(name, f"{name.replace('_', ' ').capitalize()}.", ((at, gauges[name]) for at, gauges in values))
        yield self._realtime(first)
        for name in ("num_retracted_reqs", "num_paused_reqs"):  # a few gauges of SGLang have the process as well
            yield _gauge(name, "Number of such requests.", (({**at, "pid": str(os.getpid())}, 0) for at, _ in first))

    def _realtime(self, ranks: Iterable[tuple[dict[str, str], RankHistory]]) -> Metric:
        family = CounterMetricFamily("sglang:realtime_tokens", "Tokens processed, by mode.", labels=["mode"])
        for labels, history in ranks:
            rank = history.rank
            # SGLang counts decode steps, the one among them that is too much at the end of every request; as there is
            # none for its first token, that comes to the output tokens.
            modes = {
                "prefill_compute": rank.uncached_tokens,
                "prefill_cache": rank.cached_tokens,
                "decode": rank.generated_tokens,
            }
            for mode, value in modes.items():
                if value:  # a series begins with its first token
                    family.add_sample("sglang:realtime_tokens_total", {**labels, "mode": mode}, value)
        return family

    def _labels(self, history: RankHistory, attn_tp_rank: int) -> dict[str, str]:
        settings, dp_rank = self._engine.settings, history.rank.dp_rank
        labels = {**self._model, "tp_rank": str(settings.scheduler_rank(dp_rank) + attn_tp_rank), "pp_rank": "0"}
        if settings.release.since("0.5.7"):
            labels["moe_ep_rank"] = "0"
        if settings.dp_size > 1 and settings.release.since("0.4.10"):
            labels["dp_rank"] = str(dp_rank)
        return dict(sorted(labels.items()))


def _gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(f"sglang:{name}", text)
    for labels, value in samples:
        family.add_sample(f"sglang:{name}", labels, value)
    return family


def _gauges(engine: Engine, history: RankHistory) -> dict[str, float]:
    """Return the values that a rank has last reported."""
    release, gauges = engine.settings.release, history.gauges or history.take()
    found: dict[str, float] = {
        "num_running_reqs": gauges.reported_running,
        "num_queue_reqs": gauges.queues["waiting"],
        "num_used_tokens": gauges.num_used_tokens,
        "token_usage": round(gauges.token_usage, 2),
        "gen_throughput": gauges.gen_throughput,
        "cache_hit_rate": gauges.cache_hit_rate,
    }
    if release.since("0.5.7"):
        found["decode_sum_seq_lens"] = gauges.decode_sum_seq_lens
    if release.since("0.5.11"):
        found["kv_used_tokens"] = gauges.num_used_tokens
        found["kv_evictable_tokens"] = gauges.kv_evictable_tokens
        held = gauges.num_used_tokens + gauges.kv_evictable_tokens
        found["kv_available_tokens"] = gauges.max_total_num_tokens - held
    prefill_queue = "num_prefill_bootstrap_queue_reqs"
    if not release.since("0.5.11"):
        prefill_queue = "num_prefill_prealloc_queue_reqs"
    found[prefill_queue] = gauges.queues["bootstrap"]
    found["num_prefill_inflight_queue_reqs"] = gauges.queues["inflight"]
    found["num_decode_prealloc_queue_reqs"] = gauges.queues["prealloc"]
    found["num_decode_transfer_queue_reqs"] = gauges.queues["transfer"]
    if release.since("0.5.9"):
        found["pending_prealloc_token_usage"] = 0.0  # exported, but nothing sets it
    if release.since("0.5.23"):
        found["prealloc_full_token_usage"] = _reserved_share(gauges)
        found["full_token_usage"] = gauges.token_usage
        found["utilization"] = utilization(engine.settings)
    return found


def _reserved_share(gauges: Snapshot) -> float:
    return round((gauges.num_total_tokens - gauges.num_active_tokens) / gauges.max_total_num_tokens, 3)
