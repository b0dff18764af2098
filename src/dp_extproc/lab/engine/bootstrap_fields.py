"""What prefill and decode releases send each other at the first request of a pair, and what they make of it. Pure.

Sources: ``PrefillServerInfo`` and ``try_ensure_parallel_info`` of ``disaggregation/common/conn.py``, and before 0.5.10
``_get_prefill_parallel_info_from_server``; ``MetadataBuffers`` of ``disaggregation/utils.py``.
"""

from collections.abc import Mapping
from typing import Any, Final

from dp_extproc.lab.engine.release import Release
from dp_extproc.lab.engine.settings import Settings

_ADDED: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("0.5.16", {"enable_dsa_cache_layer_split": False, "prefill_http_port": None}),
    ("0.5.22", {"decode_allocation_policy": "early"}),
    ("0.5.23", {"enable_kv_cache_sharding": False}),
)
"""The fields of ``/route`` that releases have added and always send, with their defaults."""
_FIRST: Final = ("attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size", "kv_cache_dtype")
"""The fields that 0.5.10 has, besides ``follow_bootstrap_room``."""


def prefill_facts(settings: Settings) -> dict[str, Any]:
    """Return what ``/route`` answers for all ranks (-1)."""
    release, tp_size = settings.release, settings.attn_tp_size
    if not release.routes_by_field:
        renamed = {"prefill_attn_tp_size" if release.since("0.5.1") else "prefill_tp_size": tp_size}
        facts = {**renamed, "prefill_dp_size": settings.dp_size, "prefill_pp_size": 1}
        return facts | ({"prefill_page_size": settings.page_size} if release.since("0.5.8") else {})
    values = (tp_size, 1, settings.dp_size, 1, settings.page_size, settings.kv_cache_dtype)
    added = {name: value for fields in _added(release) for name, value in fields.items()}
    added |= {"prefill_http_port": settings.port} if "prefill_http_port" in added else {}
    return {**dict(zip(_FIRST, values, strict=True)), "follow_bootstrap_room": settings.follows_rooms, **added}


def reads(release: Release, facts: Mapping[str, Any]) -> bool:
    """Whether a decode release makes sense of such an answer.

    From 0.5.10 on it is the arguments of a dataclass, which has defaults for the fields that releases have added.
    """
    if not release.routes_by_field:
        return ("prefill_attn_tp_size" if release.since("0.5.1") else "prefill_tp_size") in facts
    needed = {*_FIRST, "follow_bootstrap_room"}
    return needed <= facts.keys() <= needed | {name for fields in _added(release) for name in fields}


def metadata_buffers(release: Release) -> int:
    """Count the buffers that go from prefill to decode beside the KV cache; optional ones are left out."""
    if not release.since("0.5.3"):
        return 6
    return 10 if release.since("0.5.9") else 9


def _added(release: Release) -> list[Mapping[str, Any]]:
    return [fields for since, fields in _ADDED if release.since(since)]
