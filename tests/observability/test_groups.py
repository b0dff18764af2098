"""Revision groups as operators see them: on /loads and on /metrics."""

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.observability.groups import GroupMetrics, describe_excluded_pairs, describe_groups
from fleet_fixtures import address_of, make_endpoint, make_facts


@pytest.fixture
def loads() -> LoadCache:
    """Two prefill endpoints and one decode endpoint of v1, and one prefill endpoint of v2, all discovered."""
    groups = [(Role.PREFILL, "v1"), (Role.PREFILL, "v1"), (Role.DECODE, "v1"), (Role.PREFILL, "v2")]
    endpoints = [
        replace(make_endpoint(role, number), group=group) for number, (role, group) in enumerate(groups, start=1)
    ]
    cache = LoadCache([*endpoints, make_endpoint(Role.WORKER, pool="plain")], 5.0)
    for each in endpoints:
        cache.discovered(each, address_of(each), make_facts(each.role), 0.0)
    return cache


def test_groups_page_has_weights_sizes_and_completeness(loads: LoadCache) -> None:
    """A group that only has a weight is there, too, since it may be rolled out next. Pools without groups are not."""
    assert describe_groups(loads, {"*": {"v2": 0.05, "v3": 0.0}, "plain": {}}) == [
        {"pool": "*", "group": "v1", "weight": None, "endpoints": {"prefill": 2, "decode": 1}, "complete": True},
        {"pool": "*", "group": "v2", "weight": 0.05, "endpoints": {"prefill": 1}, "complete": False},
        {"pool": "*", "group": "v3", "weight": 0.0, "endpoints": {}, "complete": False},
    ]


def test_excluded_pairs_have_their_reason(loads: LoadCache) -> None:
    """Endpoints that are alike for pairing are listed together."""
    (excluded,) = describe_excluded_pairs(loads)

    assert excluded["reason"] == "group is v2 on prefill and v1 on decode"
    assert (excluded["pool"], excluded["prefill"], excluded["decode"]) == (
        "*",
        (make_endpoint(Role.PREFILL, 4).url,),
        (make_endpoint(Role.DECODE, 3).url,),
    )


def test_group_metrics_have_requests_sizes_and_weights(loads: LoadCache) -> None:
    """A group that is gone has no samples any more, whatever it had served."""
    registry = CollectorRegistry()
    counts: dict[tuple[str, str | None], int] = {("*", "v1"): 19, ("*", "v2"): 1, ("*", "gone"): 7}
    registry.register(GroupMetrics(loads, lambda: {"*": {"v2": 0.05}}, lambda: counts))
    page = generate_latest(registry).decode()
    samples = {line for line in page.splitlines() if not line.startswith("#")}

    assert samples == {
        'dp_extproc_group_weight{group="v2",pool="*"} 0.05',
        'dp_extproc_group_complete{group="v1",pool="*"} 1.0',
        'dp_extproc_group_complete{group="v2",pool="*"} 0.0',
        'dp_extproc_group_endpoints{group="v1",pool="*",role="prefill"} 2.0',
        'dp_extproc_group_endpoints{group="v1",pool="*",role="decode"} 1.0',
        'dp_extproc_group_endpoints{group="v2",pool="*",role="prefill"} 1.0',
        'dp_extproc_group_requests_total{group="v1",pool="*"} 19.0',
        'dp_extproc_group_requests_total{group="v2",pool="*"} 1.0',
    }
