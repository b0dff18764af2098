"""Serve an engine's pages about itself: ``/server_info``, ``/model_info``, ``/v1/models``, ``/health``, ``/ready``."""

import asyncio
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from dp_extproc.lab.engine.api.fields import legs
from dp_extproc.lab.engine.api.generate import probe_fields
from dp_extproc.lab.engine.engine import Engine
from dp_extproc.lab.engine.leg import Failure
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import EngineKind, Settings
from dp_extproc.lab.engine.text import ids_prompt

_LLAMA: Final[dict[str, Any]] = {
    "preferred_sampling_params": None,
    "load_format": "dummy",
    "reasoning_parser": None,
    "tool_call_parser": None,
    "has_image_understanding": False,
    "has_audio_understanding": False,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
"""Content of ``/model_info`` for a model that reads and writes text; ``embedding`` is left out."""
_HEALTH_TIMEOUT = 20.0
"""``SGLANG_HEALTH_CHECK_TIMEOUT``, unscaled."""

FLUSHED: Final = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


def mode(role: Role) -> str:
    """Return the ``disaggregation_mode``."""
    return "null" if role is Role.UNIFIED else str(role)


def utilization(settings: Settings) -> float:
    """Return SGLang's ``utilization``, which is not measured; prefill reports that."""
    return -1.0 if settings.role is Role.PREFILL else 0.0


def server_info(settings: Settings, role: Role) -> dict[str, Any]:
    """Return the resolved options of the engine that routers and tests read; *role* is its present one."""
    release, ranks = settings.release, settings.dp_size
    sizes: dict[str, Any] = {"dp_size": ranks}
    if release.counts_replicas:  # from here on dp_size counts replicas
        sizes = (
            {"dp_size": 1, "attn_dp_size": ranks} if settings.dp_attention else {"dp_size": ranks, "attn_dp_size": 1}
        )
    state = {"max_total_num_tokens": settings.capacity, "disaggregation_mode": mode(role)}
    return {
        "model_path": f"/models/{settings.model}",
        "served_model_name": settings.model,
        "context_length": settings.context_length,
        "host": settings.host,
        "port": settings.port,
        "tp_size": settings.attn_tp_size * (ranks if settings.dp_attention else 1),
        "pp_size": 1,
        **sizes,
        "load_balance_method": settings.method,
        "enable_dp_attention": settings.dp_attention,
        "disaggregation_mode": mode(settings.role),
        "enable_pd_role_switch": settings.role_switch,
        "disaggregation_bootstrap_port": settings.bootstrap_port,
        "disaggregation_transfer_backend": settings.transfer_backend,
        "enable_metrics": settings.enable_metrics,
        "page_size": settings.page_size,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "disable_radix_cache": not settings.caches_prefixes,
        "enable_cache_report": settings.enable_cache_report,
        "chunked_prefill_size": settings.rank_chunk or -1,
        "max_prefill_tokens": settings.max_prefill_tokens,
        "max_running_requests": settings.max_running_requests,
        "num_reserved_decode_tokens": settings.reserved_decode_tokens,
        "decode_log_interval": settings.decode_log_interval,
        "load_snapshot_publish_interval": 15,
        "status": "ready",
        "max_total_num_tokens": settings.capacity,
        "max_req_input_len": settings.max_input,
        "kv_events": None,
        "internal_states": [state for _ in range(ranks)],
        "version": str(release),
    }


def model_info(settings: Settings) -> dict[str, Any]:
    """Return the facts of the model."""
    info: dict[str, Any] = {"model_path": f"/models/{settings.model}", "is_generation": True}
    if settings.release.since("0.5.18"):
        info["served_model_name"] = settings.model
    if settings.release.since("0.5.22"):
        info |= {"disaggregation_mode": mode(settings.role), **_LLAMA}
    return {**info, "tokenizer_path": f"/models/{settings.model}", "weight_version": "default"}


def models(settings: Settings) -> dict[str, Any]:
    """Return the list of models: one, and its adapters, which SGLang lists from 0.5.4 on."""
    owner = "vllm" if settings.kind is EngineKind.VLLM else "sglang"
    common = {"object": "model", "created": int(time.time()), "owned_by": owner}
    base = {"root": settings.model, "parent": None, "max_model_len": settings.context_length}
    cards = [{"id": settings.model, **common, **base}]
    if settings.kind is EngineKind.VLLM or settings.release.since("0.5.4"):
        adapters = settings.lora_adapters
        rest = {"parent": settings.model, "max_model_len": None}
        cards += [{"id": name, **common, "root": f"/adapters/{name}", **rest} for name in adapters]
    return {"object": "list", "data": cards}


def steps(engine: Engine) -> list[dict[str, Any]]:
    """Return the steps of each step group: their seconds, and the seconds in which ranks waited."""
    return [
        {
            "steps": group.steps,
            "seconds": group.seconds,
            "waited": group.waited,
            "late": pace.lost / engine.settings.time_scale,
            "ranks": [
                {
                    "dp_rank": rank.dp_rank,
                    "computed_tokens": rank.uncached_tokens,
                    "cached_tokens": rank.cached_tokens,
                    "generated_tokens": rank.generated_tokens,
                }
                for rank in group.ranks
            ],
        }
        for group, pace in zip(engine.groups, engine.paces, strict=True)
    ]


async def health(_: Request, engine: Engine) -> Response:
    """Answer like SGLang: a real generation of one token, which moves the counters of some rank."""
    settings = engine.settings
    (ticket,) = engine.submit(legs(probe_fields(), [ids_prompt([0])], 1, 1, is_batch=False))
    await asyncio.sleep(settings.timeouts.health * settings.time_scale)
    if await ticket.wait_for_end(_HEALTH_TIMEOUT * settings.time_scale) and not isinstance(ticket.end, Failure):
        return Response(status_code=200)
    engine.end(ticket, Failure(None, "health check"))
    return Response(status_code=503)


def ready(*, is_draining: bool) -> Response:
    """Answer at once: the engine has started, and does not shut down."""
    return PlainTextResponse("", 503 if is_draining else 200)
