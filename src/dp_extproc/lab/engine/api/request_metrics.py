"""Serve the part of ``/metrics`` that counts requests which have ended; most of it without ranks, as in SGLang."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from dp_extproc.lab.engine.leg import Finished
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import Settings
from dp_extproc.lab.engine.ticket import Ticket

_TO_FIRST_TOKEN: Final = (
    0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400,
)  # fmt: skip
_TO_END: Final = (*_TO_FIRST_TOKEN, 600, 1200, 1800, 2400)
_PER_TOKEN: Final = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2,
    4, 6, 8,
)  # fmt: skip
_QUEUED: Final = (
    0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, *range(1, 6), 10, 15, 20, *range(30, 101, 10), *range(200, 1001, 100),
    *range(1200, 2001, 200), 2500, 3000,
)  # fmt: skip
_TOKENS: Final = (
    100, 300, 500, 700, 1000, 1500, *range(2000, 10001, 1000), *range(12500, 30001, 2500), 35000, 40000, 60000, 80000,
    *range(100000, 400001, 100000), 600000, 800000, 1e6, 1.1e6,
)  # fmt: skip


class RequestMetrics:
    """Count the requests of one engine."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, rank_labels: list[dict[str, str]]) -> None:
        """Register the series; each begins with what it counts first.

        Args:
            settings: Options of the engine.
            registry: Registry of its page.
            rank_labels: Labels of the series of each rank's scheduler.
        """
        self._role = settings.role
        self._model = {"model_name": settings.model, "engine_type": str(settings.role)}
        self._ranks = rank_labels
        model, streaming = tuple(self._model), (*self._model, "is_streaming")

        def counter(name: str, text: str, labels: tuple[str, ...] = model) -> Counter:
            return Counter(f"sglang:{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = streaming
        ) -> Histogram:
            return Histogram(f"sglang:{name}", text, labels, buckets=buckets, registry=registry)

        self._prompt = counter("prompt_tokens", "Number of prefill tokens processed.", streaming)
        # Until 0.5.8 without the source.
        self._source = {"cache_source": "device"} if settings.release.since("0.5.9") else {}
        self._cached = counter("cached_tokens", "Number of cached prompt tokens.", (*model, *self._source))
        self._generation = counter("generation_tokens", "Number of generation tokens processed.", streaming)
        self._requests = counter("num_requests", "Number of requests processed.", streaming)
        self._aborted = counter("num_aborted_requests", "Number of requests aborted.")
        first = "Histogram of time to first token in seconds."
        self._ttft = histogram("time_to_first_token_seconds", first, _TO_FIRST_TOKEN)
        end = "Histogram of End-to-end request latency in seconds"
        self._e2e = histogram("e2e_request_latency_seconds", end, _TO_END)
        between = "Histogram of inter-token latency in seconds."
        self._itl = histogram("inter_token_latency_seconds", between, _PER_TOKEN, model)
        mean = "Per-request TPOT in seconds."
        self._tpot = histogram("request_time_per_output_token_seconds", mean, _PER_TOKEN)
        queued = "Histogram of queueing time in seconds."
        self._queued = histogram("queue_time_seconds", queued, _QUEUED, tuple(rank_labels[0]))
        self._lengths = {
            what: histogram(f"{what}_tokens_histogram", f"Histogram of {what} token length.", _TOKENS, model)
            for what in ("prompt", "uncached_prompt", "generation")
        }

    def ended(self, ticket: Ticket) -> None:
        """Count a sequence that has ended."""
        if not isinstance(ticket.end, Finished) or ticket.ended_at is None:
            self._aborted.labels(**self._model).inc()
            return
        labels = {**self._model, "is_streaming": str(ticket.streaming).lower()}
        prompt, cached, output = ticket.leg.prompt_tokens, ticket.work.cached_tokens, len(ticket.tokens)
        self._prompt.labels(**labels).inc(prompt)
        if cached:
            self._cached.labels(**self._model, **self._source).inc(cached)
        self._generation.labels(**labels).inc(output)
        self._requests.labels(**labels).inc()
        for what, tokens in (("prompt", prompt), ("uncached_prompt", prompt - cached), ("generation", output)):
            self._lengths[what].labels(**self._model).observe(tokens)
        if ticket.work.started_at is not None:
            waited = max(0.0, ticket.work.started_at - ticket.queued_at)
            self._queued.labels(**self._ranks[ticket.work.dp_rank]).observe(waited)
        self._e2e.labels(**labels).observe(ticket.ended_at - ticket.received_at)
        if self._role is Role.PREFILL:
            return
        first = ticket.first_token_reported_at(self._role) or ticket.ended_at
        self._ttft.labels(**labels).observe(first - ticket.received_at)
        if output > 1 and ticket.ended_at > first:
            gap = (ticket.ended_at - first) / (output - 1)
            self._tpot.labels(**labels).observe(gap)
            for _ in range(output - 1):
                self._itl.labels(**self._model).observe(gap)
