"""``/metrics``: gauges per rank, as stale as SGLang's; counters and histograms of the HTTP process, without ranks."""

import os
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from dp_extproc.engine.engine import Engine
from dp_extproc.engine.leg import Finished
from dp_extproc.engine.scheduler.snapshot import RankHistory, Snapshot
from dp_extproc.engine.scheduler.work import Role
from dp_extproc.engine.ticket import Ticket

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics(Collector):
    """The page of one server."""

    def __init__(self, engine: Engine) -> None:
        """Register the series of *engine*."""
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        model = {"model_name": engine.settings.model, "engine_type": str(engine.settings.role)}
        names, streaming = tuple(model), ("is_streaming",)

        def counter(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"sglang:{name}", help_text, (*names, *labels), registry=self._registry)

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"sglang:{name}", help_text, (*names, *streaming), registry=self._registry)

        self._model = model
        self._prompt = counter("prompt_tokens", "Number of prefill tokens processed.", streaming)
        # Until 0.5.8 without the source.
        self._source = {"cache_source": "device"} if engine.settings.release.since("0.5.10") else {}
        self._cached = counter("cached_tokens", "Number of cached prompt tokens.", tuple(self._source))
        self._generation = counter("generation_tokens", "Number of generation tokens processed.", streaming)
        self._requests = counter("num_requests", "Number of requests processed.", streaming)
        self._aborted = counter("num_aborted_requests", "Number of requests aborted.")
        self._ttft = histogram("time_to_first_token_seconds", "Histogram of time to first token in seconds.")
        self._e2e = histogram("e2e_request_latency_seconds", "Histogram of End-to-end request latency in seconds.")

    def ended(self, ticket: Ticket) -> None:
        """Count a sequence that has ended."""
        if not isinstance(ticket.end, Finished):
            self._aborted.labels(**self._model).inc()
            return
        labels = {**self._model, "is_streaming": str(ticket.streaming).lower()}
        self._prompt.labels(**labels).inc(ticket.leg.prompt_tokens)
        if ticket.work.cached_tokens:
            self._cached.labels(**self._model, **self._source).inc(ticket.work.cached_tokens)
        self._generation.labels(**labels).inc(len(ticket.tokens))
        self._requests.labels(**labels).inc()
        if ticket.ended_at is not None:
            self._e2e.labels(**labels).observe(ticket.ended_at - ticket.received_at)
            if self._engine.settings.role is not Role.PREFILL:
                self._ttft.labels(**labels).observe((ticket.first_token_at or ticket.ended_at) - ticket.received_at)

    def page(self) -> bytes:
        """Write the page."""
        self._engine.refresh()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Give the series of the schedulers."""
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
        yield _gauge("page_size", "Page size.", ((at, 1) for at, _ in every))
        names = _gauges(self._engine, ranks[0]) if ranks else {}
        values = [(at, _gauges(self._engine, history)) for at, history in first]
        for name in names:
            yield _gauge(name, f"{name.replace('_', ' ').capitalize()}.", ((at, gauges[name]) for at, gauges in values))
        yield self._realtime(first)
        for name in ("num_retracted_reqs", "num_paused_reqs"):  # a few gauges of SGLang carry the process as well
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
    """Give the values that a rank has last reported."""
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
    return found


def _reserved_share(gauges: Snapshot) -> float:
    return round((gauges.num_total_tokens - gauges.num_active_tokens) / gauges.max_total_num_tokens, 3)
