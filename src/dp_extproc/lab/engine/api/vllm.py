"""Serve what an aggregated vLLM engine has of its own: its errors, and its metrics with a series per rank.

Each DP rank is an "engine" there. Facts are those of vLLM 0.11 (``v1/metrics/loggers.py``, ``entrypoints/openai``).
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import json_response
from dp_extproc.lab.engine.engine import Engine
from dp_extproc.lab.engine.leg import RefusedError
from dp_extproc.lab.engine.scheduler.work import Stage

PATHS: Final = ("/v1/completions", "/v1/chat/completions")
BLOCK_SIZE: Final = 16


def refused(error: RefusedError) -> Response:
    """Answer a ValueError of the input processor."""
    content = {"message": error.message, "type": "BadRequestError", "param": None, "code": 400}
    return json_response({"error": content}, 400)


def metrics_page(engine: Engine) -> bytes:
    """Write the page."""
    registry = CollectorRegistry()
    registry.register(_Metrics(engine))
    return generate_latest(registry)


class _Metrics(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Number of requests in model execution batches.")
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Number of requests waiting to be processed.")
        reasons = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "Number of waiting requests by reason.")
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        cache = GaugeMetricFamily("vllm:cache_config_info", "Information of the LLMEngine CacheConfig")
        prompts = CounterMetricFamily("vllm:prompt_tokens", "Number of prefill tokens processed.")
        settings = self._engine.settings
        for rank in self._engine.ranks:
            labels = {"engine": str(rank.dp_rank), "model_name": settings.model}
            works = list(rank.works())
            idle = sum(work.stage is Stage.WAITING for work in works)
            used = sum(work.context for work in works if work.stage is not Stage.WAITING)
            capacity = rank.limits.capacity
            config = {
                "block_size": str(BLOCK_SIZE),
                "num_gpu_blocks": str(capacity // BLOCK_SIZE),
                "enable_prefix_caching": str(settings.caches_prefixes),
                "engine": str(rank.dp_rank),
            }
            running.add_sample(running.name, labels, len(works) - idle)
            waiting.add_sample(waiting.name, labels, idle)
            reasons.add_sample(reasons.name, {**labels, "reason": "capacity"}, idle)
            usage.add_sample(usage.name, labels, used / capacity)
            cache.add_sample(cache.name, config, 1)
            prompts.add_sample(f"{prompts.name}_total", labels, rank.uncached_tokens + rank.cached_tokens)
        return iter((running, waiting, reasons, usage, cache, prompts))
