"""Serve the routes of an engine that give the scheduler nothing to do: texts, pages and control of the engine.

Each request stands in the journal. Control of the engine changes nothing here, because a router must never send it.
"""

from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import json_response
from dp_extproc.lab.engine.settings import EngineKind, Settings

_POST: Final = ("POST",)
_BOTH: Final = ("GET", "POST")
_CONTROL: Final = (
    "add_external_corpus", "begin_weight_update", "clear_hicache_storage_backend", "close_session",
    "configure_logging", "continue_generation", "destroy_weights_update_group", "dump_expert_distribution_record",
    "end_weight_update", "freeze_gc", "get_weights_by_name", "init_weights_send_group_for_remote_instance",
    "init_weights_update_group", "load_lora_adapter", "load_lora_adapter_from_tensors", "open_session",
    "pause_generation", "release_memory_occupation", "remove_external_corpus",
    "resume_memory_occupation", "scale_elastic_ep", "send", "send_weights_to_remote_instance", "set_internal_state",
    "set_trace_level", "slow_down", "start_expert_distribution_record", "start_profile",
    "stop_expert_distribution_record", "stop_profile", "unload_lora_adapter", "update_weight_version",
    "update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_ipc",
    "update_weights_from_tensor", "weights_checker",
)  # fmt: skip
"""Control of SGLang; some of it takes GET, too."""
_VLLM_CONTROL: Final = (
    "abort_requests", "collective_rpc", "finish_weight_update", "init_weight_transfer_engine", "pause",
    "release_kv_cache_memory", "reset_encoder_cache", "reset_mm_cache", "reset_prefix_cache", "resume",
    "scale_elastic_ep", "sleep", "start_profile", "stop_profile", "start_weight_update", "update_weight_version",
    "update_weights", "v1/load_lora_adapter", "v1/unload_lora_adapter", "wake_up", "weight_checker",
)  # fmt: skip
_VLLM_COMPUTED: Final = (
    "v1/embeddings", "v1/score", "score", "rerank", "v1/rerank", "v2/rerank", "v2/embed", "pooling", "classify",
    "v1/audio/transcriptions", "v1/audio/translations", "invocations", "generative_scoring", "cohere/v2/chat",
    "v1/chat/completions/batch", "inference/v1/generate", "v1/decisions", "v1/systemone",
)  # fmt: skip
"""Paths of vLLM whose results are left out."""
_TEXTS: Final = ("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize")
_RENDERING: Final = tuple(
    f"{path}/render" for path in ("v1/chat/completions", "v1/completions", "v1/messages", "v1/responses")
)
_COUNT: Final = "/v1/messages/count_tokens"


def other_routes(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Return the methods of each such route of the engine's release."""
    docs = {"/openapi.json": ("GET",), "/docs": ("GET",)}
    if settings.kind is EngineKind.VLLM:
        own = dict.fromkeys((f"/{path}" for path in (*_VLLM_CONTROL, *_VLLM_COMPUTED, *_RENDERING)), _POST)
        pages = dict.fromkeys(("/load", "/is_sleeping"), ("GET",))
        return {**docs, **own, **pages, **dict.fromkeys(("/tokenize", "/detokenize", _COUNT), _POST), "/ping": _BOTH}
    release = settings.release
    routes = {**docs, "/ping": ("GET",), **{f"/{path}": _BOTH for path in _CONTROL}}
    routes |= dict.fromkeys(("/parse_function_call", "/separate_reasoning"), _POST)
    if release.since("0.5.3"):
        routes |= dict.fromkeys(_TEXTS, _POST)
    if release.since("0.5.9"):
        routes |= {_COUNT: _POST, "/hicache/storage-backend": ("GET", "PUT", "DELETE")}
    if release.since("0.5.10"):
        routes["/"] = ("GET", "HEAD")
    if release.since("0.5.21"):
        routes["/pd_role_switch"] = _POST
    return routes


async def answer(request: Request, settings: Settings) -> Response:
    """Answer a request of such a route. A token of the stand-in is a byte of UTF-8."""
    path = request.url.path
    if path == "/":
        return json_response("SGLang is running")
    if path.endswith("/tokenize"):
        tokens = list(_text(await _body(request), "prompt").encode())
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": settings.context_length})
    if path.endswith("/detokenize"):
        ids = (await _body(request)).get("tokens") or ()
        return json_response({"text": bytes(each for each in ids if 0 <= each < 256).decode(errors="replace")})
    if path == _COUNT:
        return json_response({"input_tokens": len(msgspec.json.encode((await _body(request)).get("messages")))})
    if path[1:] in _VLLM_COMPUTED and settings.kind is EngineKind.VLLM:
        return json_response({"detail": "the strict engine does not implement this path"}, 501)
    return json_response({})


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(await request.body())
    except msgspec.DecodeError:
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is no JSON object")
    return body


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise HTTPException(400, f"{name} is no text")
    return value
