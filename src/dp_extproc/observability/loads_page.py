"""Describes the load cache and the exchange between replicas as JSON data, for /loads."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from dp_extproc.engines.listener import EngineFailure
from dp_extproc.fleet.discovery.roster import Roster
from dp_extproc.load.autoscaling import Signal
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.step_group import RankLoad
from dp_extproc.observability.endpoint_states import state_of
from dp_extproc.sync.transport.replica import SyncStatus


def describe_loads(loads: LoadCache, now: float) -> dict[str, Any]:
    """Describe every configured endpoint, with its ranks once it is discovered. Times are ages in seconds."""
    return {
        "stale_after": loads.stale_after,
        "prompt_bytes_per_token": {pool: round(ratio.bytes_per_token, 3) for pool, ratio in loads.ratios.items()},
        "endpoints": [
            {
                "url": endpoint.url,
                "pool": endpoint.pool,
                "role": endpoint.role.value,
                "source": endpoint.source.value,
                "name": endpoint.name or None,
                "uid": endpoint.uid or None,
                "endpoint_state": state_of(loads.by_url.get(endpoint.url), now, loads.stale_after).value,
                "group": endpoint.group,
                "failure": _describe_failure(loads.failures.get(endpoint.url)),
                **_describe_endpoint(loads.by_url.get(endpoint.url), loads.stale_after, now),
            }
            for endpoint in loads.endpoints
        ],
        "draining": [
            {"url": load.url, "name": load.configured.name or None, "reservations": load.reservations}
            for load in loads.draining
        ],
    }


def describe_sources(roster: Roster, now: float) -> list[dict[str, Any]]:
    """Describe every source but the configuration itself. Ages are in seconds, and 0 while a source reports."""
    return [
        {
            "source": source.name,
            "pool": source.place.pool,
            "role": source.place.role.value,
            "members": None if (members := roster.reports[key].members) is None else len(members),
            "failure": roster.reports[key].failure,
            "age": round(roster.reports[key].age(now), 3),
        }
        for key, source in roster.sources.items()
        if source.source is not None
    ]


def _describe_failure(failure: EngineFailure | None) -> str | None:
    return None if failure is None else f"{failure.kind.value}: {failure.message}"


def _describe_endpoint(load: EndpointLoad | None, stale_after: float, now: float) -> dict[str, Any]:
    if load is None:
        return {"state": "undiscovered", "ranks": []}
    return {
        "state": load.freshness(now, stale_after).name.lower(),
        "address": load.address,
        "version": str(load.facts.version) if load.facts.version else None,
        "age": _age(load.sampled_at, now),
        "time_per_output_token": None if (tpot := load.tpot) is None else round(tpot, 6),
        "time_per_prompt_token": None if (pace := load.time_per_prompt_token) is None else round(pace, 9),
        "cached_tokens": round(load.cached_prompt_tokens),
        "prefix_cache": {
            "expected_tokens": round(load.prefix_truth.expected),
            "found_tokens": round(load.prefix_truth.found),
            "credited_share": round(load.prefix_truth.share(now), 3),
        },
        "expired_reservations": load.expired,
        "suspect_ranks": [rank.index for group in load.suspect_groups for rank in group.ranks],
        "ranks": [_describe_rank(rank, now) for rank in load.ranks],
    }


def _describe_rank(rank: RankLoad, now: float) -> dict[str, Any]:
    sample = rank.sample
    reported = None
    if sample is not None:
        reported = {
            "tokens": sample.tokens,
            "used_tokens": sample.used_tokens,
            "total_tokens": sample.total_tokens,
            "waiting_uncached_tokens": sample.waiting_uncached_tokens,
            "running_requests": sample.running_requests,
            "waiting_requests": sample.waiting_requests,
            "capacity_tokens": sample.capacity_tokens,
            "age": _age(rank.sampled_at, now),
        }
    return {
        "dp_rank": rank.index,
        "sample": reported,
        "reserved": {"tokens": round(rank.reserved_tokens), "requests": round(rank.reserved_requests, 3)},
        "external_tokens": round(rank.external_tokens),
        "load_tokens": round(rank.tokens),
        "picks": rank.picks,
    }


def _age(sampled_at: float, now: float) -> float | None:
    return None if sampled_at == float("-inf") else round(now - sampled_at, 3)


def describe_sync(status: SyncStatus) -> dict[str, Any]:
    """Describe the exchange between replicas. Times are ages in seconds."""
    page = asdict(status)
    for peer in page["peers"]:
        peer["age"] = round(peer["age"], 3)
    return page


def describe_signals(signals: Iterable[Signal]) -> list[dict[str, Any]]:
    """Describe the autoscaling signals, each with the shares that it follows from."""
    return [
        {
            "pool": signal.pool,
            "role": signal.role.value,
            "saturation": round(signal.saturation, 4),
            "wanted_endpoints": round(signal.wanted, 3),
            "endpoints": signal.endpoints,
            "target": signal.target,
            "measures": {measure.value: round(share, 4) for measure, share in signal.measures.items()},
        }
        for signal in signals
    ]
