"""Compares a prefill and a decode endpoint by their groups and by the settings that both engines report. Pure.

Endpoints of two revision groups are never paired. An endpoint without a group can be paired with any group. Endpoints
that may be paired by their groups can still differ in a setting.

SGLang compares some settings itself at the first request of a pair (``disaggregation/common/conn.py``). Where they
differ, the decode engine ends itself: for ``page_size`` from 0.5.8 on, for ``kv_cache_dtype`` from 0.5.10 on, for
``pp_size`` from 0.5.6 on. It compares no releases, though their bootstrap protocols differ
(:mod:`dp_extproc.engines.sglang.protocol`).

Only settings that are known to fail are a difference. A setting that one engine does not report agrees with any value.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from dp_extproc.engines.model import EngineFacts, PairTerms, Version
from dp_extproc.engines.sglang.protocol import release_range, understands

_CHECKS_DTYPE: Final = Version(0, 5, 10)
"""First release in which decode compares the names of both cache types, and ends itself if they differ."""
_AUTO: Final = "auto"
_AUTO_MAY_BE: Final = frozenset({_AUTO, "fp8_e4m3"})
"""What ``--kv-cache-dtype auto`` may stand for: fp8_e4m3 for some checkpoints, which no page shows."""
_SAME_DTYPE: Final = {"bfloat16": "bf16"}
_SAME_BACKEND: Final = {"mooncake_tcp": "mooncake"}
"""Some releases report the first as the second (``arg_groups/pd_disaggregation_hook.py``)."""


GROUP: Final = "group"
"""Name of the difference between two revision groups. It is intended, where all others are faults."""


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """One reason why a prefill and a decode endpoint must not be paired."""

    name: str
    """:data:`GROUP`, ``release``, or the name of the setting on ``/server_info``."""
    prefill: str
    decode: str
    effect: str
    remedy: str

    @property
    def code(self) -> str:
        """Stable name, for documentation and tests."""
        return f"{self.name}_differs"

    def __str__(self) -> str:
        return f"{self.name} is {self.prefill} on prefill and {self.decode} on decode"


class PairingKey(NamedTuple):
    """Everything on which the pairing of an endpoint depends. A large fleet has few such keys."""

    group: str | None
    terms: PairTerms
    version: Version | None


def pairing_key(facts: EngineFacts, group: str | None = None) -> PairingKey:
    return PairingKey(group, facts.terms, facts.version)


def group_of_pair(prefill: str | None, decode: str | None) -> str | None:
    """Return the revision group of a pair that can be paired; None if neither endpoint has one."""
    return prefill if decode is None else decode


def difference(prefill: PairingKey, decode: PairingKey) -> Difference | None:
    """Return why two endpoints cannot be paired; None if no reason is known."""
    if None not in {prefill.group, decode.group} and prefill.group != decode.group:
        effect = "a request stays in one revision group"
        remedy = "give each group endpoints of both roles"
        return Difference(GROUP, str(prefill.group), str(decode.group), effect, remedy)
    if not understands(prefill.version, decode.version):
        return _releases_differ(prefill.version, decode.version)
    if prefill.terms == decode.terms:
        return None
    checks_dtype = decode.version is None or decode.version >= _CHECKS_DTYPE
    return _difference(prefill.terms, decode.terms, checks_dtype=checks_dtype)


@dataclass(frozen=True, slots=True)
class KindPair:
    """Endpoints of a pool that are alike for pairing, of both roles, and why they cannot be paired."""

    prefills: tuple[str, ...]
    """URLs, as of ``decodes``."""
    decodes: tuple[str, ...]
    group: str | None
    """The revision group of such a pair."""
    difference: Difference | None
    """None if no reason is known."""


def compare_kinds(
    prefills: Iterable[tuple[str, PairingKey]], decodes: Iterable[tuple[str, PairingKey]]
) -> list[KindPair]:
    """Compare all prefill and all decode endpoints of a pool, kind by kind. An endpoint is its URL and its key."""
    kinds: list[dict[PairingKey, list[str]]] = []
    for endpoints in (prefills, decodes):
        urls: dict[PairingKey, list[str]] = {}
        for url, key in endpoints:
            urls.setdefault(key, []).append(url)
        kinds.append(urls)
    return [
        KindPair(tuple(ones), tuple(others), group_of_pair(one.group, other.group), difference(one, other))
        for (one, ones), (other, others) in product(*(each.items() for each in kinds))
    ]


def differences(prefills: Iterable[PairingKey], decodes: Iterable[PairingKey]) -> list[Difference]:
    """List all differences between any two of these endpoints, each once."""
    pairs = product(dict.fromkeys(prefills), dict.fromkeys(decodes))
    return sorted({found for pair in pairs if (found := difference(*pair)) is not None})


def _releases_differ(prefill: Version | None, decode: Version | None) -> Difference:
    assert prefill is not None and decode is not None  # noqa: S101, PT018 - an unknown release is no difference
    effect = 'the bootstrap protocol of their releases differs ("Decode handshake failed")'
    remedy = (
        f"give each range of releases endpoints of both roles ({release_range(prefill)}; {release_range(decode)}), "
        "and from 0.5.10 on upgrade decode first"
    )
    return Difference("release", str(prefill), str(decode), effect, remedy)


def _difference(prefill: PairTerms, decode: PairTerms, *, checks_dtype: bool) -> Difference | None:
    if None not in {prefill.page_size, decode.page_size} and prefill.page_size != decode.page_size:
        effect = 'the decode server would end itself at the first request ("Page size mismatch")'
        remedy = "start both with the same --page-size"
        return Difference("page_size", str(prefill.page_size), str(decode.page_size), effect, remedy)
    if _dtypes_differ(prefill.kv_cache_dtype, decode.kv_cache_dtype, checks=checks_dtype):
        effect = 'the decode server would end itself at the first request ("KV cache dtype mismatch")'
        effect = effect if checks_dtype else "answers would be wrong"
        remedy = "start both with the same --kv-cache-dtype"
        return Difference("kv_cache_dtype", str(prefill.kv_cache_dtype), str(decode.kv_cache_dtype), effect, remedy)
    backends = prefill.transfer_backend, decode.transfer_backend
    if None not in backends and len({_SAME_BACKEND.get(str(each), each) for each in backends}) > 1:
        effect = (
            "neither understands the other: both legs would hang until they time out, and so would all later ones of "
            "the prefill rank"
        )
        remedy = "start both with the same --disaggregation-transfer-backend"
        name = "disaggregation_transfer_backend"
        return Difference(name, str(prefill.transfer_backend), str(decode.transfer_backend), effect, remedy)
    return _sizes_differ(prefill, decode) or _models_difference(prefill, decode)


def _sizes_differ(prefill: PairTerms, decode: PairTerms) -> Difference | None:
    """Compare how the layers and the heads of the model are divided.

    Each rank of decode fetches from whole ranks of prefill. Other sizes of tensor parallelism are supported, of models
    without MLA as well (sgl-project/sglang#15675), if one is a multiple of the other.
    """
    if None not in {prefill.pp_size, decode.pp_size} and decode.pp_size not in {1, prefill.pp_size}:
        effect = 'the decode server would end itself at the first request ("Decode pp size")'
        remedy = "start decode with the --pp-size of prefill, or with 1"
        return Difference("pp_size", str(prefill.pp_size), str(decode.pp_size), effect, remedy)
    one, other = prefill.attn_tp_size, decode.attn_tp_size
    if one is not None and other is not None and max(one, other) % min(one, other):
        effect = "a rank of decode would fetch parts of the KV cache from the wrong ranks of prefill"
        remedy = "choose --tp-size and --dp-size so that the tensor-parallel ranks of one DP rank are multiples"
        return Difference("attn_tp_size", str(one), str(other), effect, remedy)
    return None


def _models_difference(prefill: PairTerms, decode: PairTerms) -> Difference | None:
    if _models_differ(prefill, decode):
        effect = f"they serve different models from different paths ({prefill.model_path}, {decode.model_path})"
        remedy = "put them into pools of their own; if it is one model, start both with the same --served-model-name"
        return Difference("model", str(prefill.served_name), str(decode.served_name), effect, remedy)
    return None


def _dtypes_differ(prefill: str | None, decode: str | None, *, checks: bool) -> bool:
    if prefill is None or decode is None or prefill == decode:
        return False
    if _AUTO in {prefill, decode}:
        # In releases that compare no names, the named type may be the one that auto stands for.
        return checks and not {prefill, decode} <= _AUTO_MAY_BE
    return checks or _SAME_DTYPE.get(prefill, prefill) != _SAME_DTYPE.get(decode, decode)


def _models_differ(prefill: PairTerms, decode: PairTerms) -> bool:
    """Compare models by the names that operators gave: a path is no identity, as one model may lie at several."""
    if None in {prefill.served_name, decode.served_name, prefill.model_path, decode.model_path}:
        return False
    return prefill.served_name != decode.served_name and _name_of(prefill.model_path) != _name_of(decode.model_path)


def _name_of(path: str | None) -> str:
    """Return the last part of a path or of an id on a hub; for a snapshot in a hub's cache the name of the model."""
    parts = (path or "").rstrip("/").split("/")
    is_snapshot = len(parts) > 2 and parts[-2] == "snapshots"
    return (parts[-3].rpartition("--")[2] if is_snapshot else parts[-1]).casefold()
