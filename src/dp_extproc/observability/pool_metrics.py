"""Metrics of the endpoints of a pool under the names of the reference endpoint pickers.

Dashboards and autoscalers of the Gateway API Inference Extension read these names. Only those are here whose meaning is
the same: what the engines report, averaged over the fresh endpoints that the gateway can reach.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.core import GaugeMetricFamily, Metric

from dp_extproc.config.pools import PoolConfig
from dp_extproc.engines.model import RankSample, Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Freshness

_PREFIXES: Final = ("inference_pool_", "llm_d_epp_")
"""Of the reference picker of the Gateway API Inference Extension, and of llm-d's."""
_READY: Final = {"inference_pool_": "ready_pods", "llm_d_epp_": "ready_endpoints"}


def gateway_names(pools: Iterable[PoolConfig]) -> dict[str, str]:
    """Return the name of the gateway's pool for each pool: that of its InferencePool, if it has one.

    Prefill endpoints may have an InferencePool too, but the gateway sends no requests there.
    """
    names = {}
    for pool in pools:
        reached = (source for role, source in pool.sources() if role != Role.PREFILL)
        found = (each.inference_pool for source in reached for each in source.kubernetes if each.inference_pool)
        names[pool.name] = next(found, pool.name)
    return names


class PoolMetrics:
    """Reads the load cache whenever Prometheus scrapes."""

    def __init__(self, loads: LoadCache, names: Mapping[str, str], clock: Callable[[], float]) -> None:
        """Set up; *names* has the name of the gateway's pool for each pool."""
        self._loads = loads
        self._names = names
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        now = self._clock()
        found: dict[str, list[EndpointLoad]] = {name: [] for name in self._names.values()}
        for endpoint in self._loads.by_url.values():
            is_fresh = endpoint.freshness(now, self._loads.stale_after) is Freshness.FRESH
            if is_fresh and endpoint.role is not Role.PREFILL and endpoint.pool in self._names:
                found[self._names[endpoint.pool]].append(endpoint)
        for prefix in _PREFIXES:
            yield _gauge(
                f"{prefix}{_READY[prefix]}",
                "Endpoints with a fresh sample.",
                {name: float(len(endpoints)) for name, endpoints in found.items()},
            )
            for what, text, measure in (
                ("average_queue_size", "Mean number of waiting requests of an endpoint.", _waiting),
                ("average_running_requests", "Mean number of running requests of an endpoint.", _running),
                ("average_kv_cache_utilization", "Mean share of the KV cache that is used, from 0 to 1.", _utilization),
            ):
                yield _gauge(f"{prefix}{what}", text, _means(found, measure))


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=["name"])
    for label, value in values.items():
        gauge.add_metric([label], value)
    return gauge


def _means(
    found: Mapping[str, Iterable[EndpointLoad]], measure: Callable[[list[RankSample]], float | None]
) -> dict[str, float]:
    """Return the mean of each pool with an endpoint that reports the value."""
    means = {}
    for name, endpoints in found.items():
        samples = ([rank.sample for rank in each.ranks if rank.sample is not None] for each in endpoints)
        values = [value for each in samples if each and (value := measure(each)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def _waiting(ranks: list[RankSample]) -> float:
    return sum(rank.waiting_requests for rank in ranks)


def _running(ranks: list[RankSample]) -> float:
    return sum(rank.running_requests for rank in ranks)


def _utilization(ranks: list[RankSample]) -> float | None:
    capacity = sum(rank.capacity_tokens or 0 for rank in ranks)
    return sum(rank.used_tokens for rank in ranks) / capacity if capacity else None
