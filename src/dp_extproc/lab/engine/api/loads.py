"""Serve ``/v1/loads`` and ``/get_load``: the ranks' snapshots, with the fields that the release has."""

from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from dp_extproc.lab.engine.api.errors import json_response
from dp_extproc.lab.engine.api.exchange import LISTENER
from dp_extproc.lab.engine.api.pages import mode, utilization
from dp_extproc.lab.engine.engine import Engine
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory, Snapshot
from dp_extproc.lab.engine.settings import Settings

_SECTIONS: Final = ("core", "memory", "spec", "lora", "disagg", "queues", "all")
_SINCE: Final = {
    "num_waiting_uncached_tokens": "0.5.13",
    "num_total_tokens": "0.5.11",
    "num_active_tokens": "0.5.17",
    "num_prealloc_ready_tokens": "0.5.20",
    "total_prefill_uncached_tokens": "0.5.17",
    "total_prefill_busy_us": "0.5.17",
    "decode_moments": "0.5.17",
}
"""The release that brought a field; the others are as old as the page."""


async def loads(request: Request, engine: Engine) -> Response:
    """Answer ``GET /v1/loads``."""
    query, settings = request.query_params, engine.settings
    wanted = set(query.get("include", "all").split(","))
    if not wanted <= set(_SECTIONS):
        unknown = ", ".join(sorted(wanted - set(_SECTIONS)))
        return json_response({"detail": f"Invalid include sections: {unknown}"}, 400)
    engine.refresh()
    if not settings.release.since("0.5.13"):  # asks the schedulers, which answer between two steps
        for history in engine.histories:
            history.publish(datetime.now(UTC).timestamp())
    ranks = [_rank(engine, history, wanted) for history in engine.histories]
    if "dp_rank" in query:
        ranks = [rank for rank in ranks if str(rank["dp_rank"]) == query["dp_rank"]]
    if (listener := request.scope.get(LISTENER)) is not None:
        ranks = [rank for rank in ranks if rank["dp_rank"] == listener]
    if query.get("format") == "prometheus":
        return PlainTextResponse(_prometheus(ranks), media_type="text/plain; version=0.0.4; charset=utf-8")
    page: dict[str, Any] = {"timestamp": datetime.now(UTC).isoformat(), "version": str(settings.release)}
    if settings.release.since("0.5.17"):
        page |= {"accelerator": None, "num_accelerators": 1}
    if not settings.release.since("0.5.13"):
        page |= {"dp_rank_count": len(ranks), "aggregate": _aggregate(ranks)}
    return json_response({**page, "loads": ranks})


async def get_load(engine: Engine) -> Response:
    """Answer ``GET /get_load``, the only JSON there was before /v1/loads."""
    return json_response([_old_rank(history) for history in engine.histories])


def _old_rank(history: RankHistory) -> dict[str, Any]:
    now = history.take()
    return {
        "dp_rank": history.rank.dp_rank,
        "num_reqs": now.num_running_reqs + now.num_waiting_reqs,
        "num_waiting_reqs": now.num_waiting_reqs,
        "num_tokens": now.num_total_tokens,
    }


def _rank(engine: Engine, history: RankHistory, wanted: set[str]) -> dict[str, Any]:
    settings, snapshot = engine.settings, history.published
    if snapshot is None:
        snapshot = history.take()
    load = {"timestamp": history.published_at, "dp_rank": history.rank.dp_rank, **_core(settings, snapshot)}
    every = "all" in wanted
    if every or "memory" in wanted:
        sizes = {"weight_gb": 0.0, "kv_cache_gb": 0.0, "graph_gb": 0.0}
        load["memory"] = {**sizes, "token_capacity": snapshot.max_total_num_tokens}
    if every or "disagg" in wanted:
        load["disaggregation"] = {
            "mode": mode(engine.present_role),
            "prefill_bootstrap_queue_reqs": snapshot.queues["bootstrap"],
            "prefill_inflight_queue_reqs": snapshot.queues["inflight"],
            "decode_prealloc_queue_reqs": snapshot.queues["prealloc"],
            "decode_transfer_queue_reqs": snapshot.queues["transfer"],
            "decode_retracted_queue_reqs": 0,
            "kv_transfer_speed_gb_s": 0.0,
            "kv_transfer_latency_ms": 0.0,
        }
    if every or "queues" in wanted:
        queues = {"waiting": snapshot.queues["waiting"], "grammar": 0, "paused": 0, "retracted": 0}
        load["queues"] = {**queues, "prealloc_ready": snapshot.queues["prealloc_ready"]}
    return load


def _core(settings: Settings, snapshot: Snapshot) -> dict[str, Any]:
    release = settings.release
    values: dict[str, Any] = {
        "num_running_reqs": snapshot.num_running_reqs,
        "num_waiting_reqs": snapshot.num_waiting_reqs,
        "num_waiting_uncached_tokens": snapshot.num_waiting_uncached_tokens,
        "num_used_tokens": snapshot.num_used_tokens,
        "num_total_tokens": snapshot.num_total_tokens,
        "num_active_tokens": snapshot.num_active_tokens,
        "num_prealloc_ready_tokens": snapshot.num_prealloc_ready_tokens,
        "max_total_num_tokens": snapshot.max_total_num_tokens,
        "max_running_requests": snapshot.max_running_requests,
        "token_usage": round(snapshot.token_usage, 4),
        "gen_throughput": snapshot.gen_throughput,
        "cache_hit_rate": round(snapshot.cache_hit_rate, 4),
        "utilization": utilization(settings),
        "total_prefill_uncached_tokens": snapshot.total_prefill_uncached_tokens,
        "total_prefill_busy_us": snapshot.total_prefill_busy_us,
        "decode_moments": snapshot.decode_moments,
    }
    values = {name: value for name, value in values.items() if release.since(_SINCE.get(name, "0.5.8"))}
    if not release.since("0.5.13"):
        values["num_total_reqs"] = snapshot.num_running_reqs + snapshot.num_waiting_reqs
    return values


def _aggregate(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "total_running_reqs": sum(rank["num_running_reqs"] for rank in ranks),
        "total_waiting_reqs": sum(rank["num_waiting_reqs"] for rank in ranks),
        "total_reqs": sum(rank["num_running_reqs"] + rank["num_waiting_reqs"] for rank in ranks),
    }


def _prometheus(ranks: list[dict[str, Any]]) -> str:
    """Write every number of the ranks with an underscore name, as ``entrypoints/v1_loads.py`` does."""
    lines: dict[str, list[str]] = {}
    for rank in ranks:
        for name, value in _flat(rank):
            lines.setdefault(name, []).append(f'sglang_{name}{{dp_rank="{rank["dp_rank"]}"}} {value}\n')
    return "".join(f"# TYPE sglang_{name} gauge\n" + "".join(found) for name, found in lines.items())


def _flat(rank: dict[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in rank.items():
        if isinstance(value, dict):
            prefix = "disagg" if name == "disaggregation" else name
            found += [(f"{prefix}_{key}", each) for key, each in value.items() if not isinstance(each, str)]
        elif name != "dp_rank" and isinstance(value, int | float):
            found.append((name, value))
    return found
