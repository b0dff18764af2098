"""Describes the revision groups of each pool: their weights, sizes and requests, for /loads and for /metrics."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dp_extproc.engines.compatibility import KindPair, compare_kinds
from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache

Weights = Mapping[str, Mapping[str, float]]
"""The share of the requests of each named group, by pool."""
_Group = tuple[str, str | None]
"""A pool, and the name of a group; None for the endpoints without one."""
_BOTH: Final = (Role.PREFILL, Role.DECODE)


def describe_groups(loads: LoadCache, weights: Weights) -> list[dict[str, Any]]:
    """Describe the groups of each pool that has any, as JSON data."""
    sizes, complete = _sizes(loads, weights), _complete(loads)
    return [
        {
            "pool": pool,
            "group": group,
            "weight": weights.get(pool, {}).get(group or ""),
            "endpoints": {role.value: count for role, count in by_role.items()},
            "complete": (pool, group) in complete,
        }
        for (pool, group), by_role in sizes.items()
    ]


def describe_excluded_pairs(loads: LoadCache) -> list[dict[str, Any]]:
    """Describe which discovered endpoints are never paired, with the reason, as JSON data."""
    return [
        {"pool": pool, "prefill": pair.prefills, "decode": pair.decodes, "reason": str(pair.difference)}
        for pool in loads.matches
        for pair in _compare(loads, pool)
        if pair.difference is not None
    ]


def _compare(loads: LoadCache, pool: str) -> list[KindPair]:
    return compare_kinds(*([(each.url, each.pairing_key) for each in loads.known(pool, role)] for role in _BOTH))


def _sizes(loads: LoadCache, weights: Weights) -> dict[_Group, Counter[Role]]:
    """Count the configured endpoints of each group by role. A group that only has a weight has none."""
    grouped = loads.grouped | {pool for pool, shares in weights.items() if shares}
    sizes: dict[_Group, Counter[Role]] = {}
    for endpoint in loads.endpoints:
        if endpoint.pool in grouped:
            sizes.setdefault((endpoint.pool, endpoint.group), Counter())[endpoint.role] += 1
    for pool, shares in weights.items():
        for group in shares:
            sizes.setdefault((pool, group), Counter())
    return sizes


def _complete(loads: LoadCache) -> set[_Group]:
    """Return the groups with a discovered pair, or with a discovered aggregated endpoint."""
    complete: set[_Group] = set()
    for pool in loads.grouped:
        complete |= {(pool, pair.group) for pair in _compare(loads, pool) if pair.difference is None}
        complete |= {(pool, each.group) for each in loads.known(pool, Role.WORKER)}
    return complete


class GroupMetrics:
    """Collects the metrics of revision groups. Pools without groups have none."""

    def __init__(
        self, loads: LoadCache, weights: Callable[[], Weights], requests: Callable[[], Mapping[_Group, int]]
    ) -> None:
        """Set up; *weights* returns the present weights, and *requests* how many were scheduled in each group."""
        self._loads = loads
        self._weights = weights
        self._requests = requests

    def collect(self) -> Iterator[Metric]:
        labels = ["pool", "group"]
        weight = GaugeMetricFamily("dp_extproc_group_weight", "Configured share of the requests.", labels=labels)
        complete = GaugeMetricFamily("dp_extproc_group_complete", "1 while the group can serve.", labels=labels)
        size = GaugeMetricFamily("dp_extproc_group_endpoints", "Endpoints of the group.", labels=[*labels, "role"])
        requests = CounterMetricFamily("dp_extproc_group_requests", "Requests scheduled in the group.", labels=labels)
        weights, counts = self._weights(), self._requests()
        able = _complete(self._loads)
        for (pool, group), by_role in _sizes(self._loads, weights).items():
            names = [pool, group or ""]
            if group is not None and (share := weights.get(pool, {}).get(group)) is not None:
                weight.add_metric(names, share)
            complete.add_metric(names, float((pool, group) in able))
            requests.add_metric(names, counts.get((pool, group), 0))
            for role, count in by_role.items():
                size.add_metric([*names, role.value], count)
        yield from (weight, complete, size, requests)
