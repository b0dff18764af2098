"""Describes the load cache and the exchange between replicas as JSON, for /loads."""

from dataclasses import asdict
from typing import Any

from dp_extproc.engines.listener import EngineFailure
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.step_group import RankLoad
from dp_extproc.sync.transport.replica import SyncStatus


def describe_loads(fleet: LoadCache, now: float) -> dict[str, Any]:
    """Describe every configured endpoint, with its ranks once it is discovered. Times are ages in seconds."""
    return {
        "stale_after": fleet.stale_after,
        "prompt_bytes_per_token": {pool: round(ratio.bytes_per_token, 3) for pool, ratio in fleet.ratios.items()},
        "endpoints": [
            {
                "url": endpoint.url,
                "pool": endpoint.pool,
                "role": endpoint.role.value,
                "failure": _describe_failure(fleet.failures.get(endpoint.url)),
                **_describe_endpoint(fleet.by_url.get(endpoint.url), fleet.stale_after, now),
            }
            for endpoint in fleet.endpoints
        ],
        "draining": [{"url": host.url, "reservations": host.reservations} for host in fleet.draining],
    }


def _describe_failure(failure: EngineFailure | None) -> str | None:
    return None if failure is None else f"{failure.kind.value}: {failure.message}"


def _describe_endpoint(host: EndpointLoad | None, stale_after: float, now: float) -> dict[str, Any]:
    if host is None:
        return {"state": "undiscovered", "ranks": []}
    sampled = host.sampled_at != float("-inf")
    return {
        "state": host.freshness(now, stale_after).name.lower(),
        "address": host.address,
        "version": str(host.facts.version) if host.facts.version else None,
        "age": round(now - host.sampled_at, 3) if sampled else None,
        "time_per_output_token": None if (tpot := host.tpot) is None else round(tpot, 6),
        "cached_tokens": round(host.cached_prompt_tokens),
        "expired_reservations": host.expired,
        "ranks": [_describe_rank(rank, now) for rank in host.ranks],
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
            "age": round(now - rank.sampled_at, 3) if rank.sampled_at != float("-inf") else None,
        }
    return {
        "dp_rank": rank.index,
        "sample": reported,
        "reserved": {"tokens": round(rank.reserved_tokens), "requests": round(rank.reserved_requests, 3)},
        "external_tokens": round(rank.external_tokens),
        "load_tokens": round(rank.tokens),
        "picks": rank.picks,
    }


def describe_sync(status: SyncStatus) -> dict[str, Any]:
    """Describe the exchange between replicas. Times are ages in seconds."""
    page = asdict(status)
    for peer in page["peers"]:
        peer["age"] = round(peer["age"], 3)
    return page
