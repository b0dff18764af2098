"""Reads the pages of vLLM: ``/version`` and ``/metrics``.

vLLM has no page of its launch arguments. Each of its DP ranks has series of its own, with the label ``engine``. With
``--data-parallel-hybrid-lb`` the label counts the ranks of all nodes, while requests name a rank of their node
(``v1/engine/input_processor.py``). So ranks are counted here in the order of the labels.

All readers raise :class:`dp_extproc.engines.pages.ReaderError` on any bytes but those of their page.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from msgspec import Struct
from prometheus_client.samples import Sample

from dp_extproc.engines.model import EngineFacts, Kind, LoadPage, Mode, ModelCard, RankSample, parse_version
from dp_extproc.engines.pages import METRICS_PAGE, lines_of, rank_of, read_json, read_samples, wrong_shape
from dp_extproc.engines.quantities import MAX_RANKS, count, impossible, share

_RUNNING: Final = "num_requests_running"
_WAITING: Final = "num_requests_waiting"
_USAGE: Final = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
"""Names of the share of KV blocks in use, from 0 to 1; the second name is the older one."""
_CACHE: Final = "cache_config_info"
_PROMPT_TOKENS: Final = "prompt_tokens_total"

_DIGITS: Final = re.compile(r"[0-9]{1,2000}")
"""Digits of a number, within the 4300 that Python converts; a line has no more than 2048 bytes."""
_NEEDED: Final = lines_of("vllm", (_RUNNING, _WAITING, *_USAGE, _CACHE, _PROMPT_TOKENS))


class _Version(Struct):
    version: str


def read_version(page: bytes) -> str:
    """Read the body of ``GET /version``."""
    return read_json(page, _Version, "/version", of="vLLM").version


def facts_of(version: str, cards: tuple[ModelCard, ...], metrics: bytes) -> EngineFacts:
    """Put together the facts of an engine from its reported version, its models and the body of ``GET /metrics``.

    The first model is the base one.
    """
    samples = _samples(metrics)
    caches = [sample for sample in samples if _name(sample) == _CACHE]
    ranks = len({rank_of(sample, "engine") for sample in samples})
    if not 1 <= ranks <= MAX_RANKS:
        raise impossible(ranks, METRICS_PAGE, "its number of DP ranks")
    return EngineFacts(
        version=parse_version(version),
        dp_ranks=ranks,
        mode=Mode.UNIFIED,
        served_model=cards[0].name if cards else None,
        cards=cards,
        metrics_enabled=True,
        prefix_cache=all(sample.labels.get("enable_prefix_caching") != "False" for sample in caches),
        kind=Kind.VLLM,
    )


def read_vllm_metrics(page: bytes) -> LoadPage:
    """Read the body of ``GET /metrics``."""
    gauges: dict[int, dict[str, float]] = defaultdict(dict)
    capacities: dict[int, int] = {}
    prompt_tokens: list[int] = []
    for sample in _samples(page):
        engine, name = rank_of(sample, "engine"), _name(sample)
        if name == _CACHE:
            if (capacity := _capacity(sample.labels)) is not None:
                capacities[engine] = capacity
        elif name == _PROMPT_TOKENS:
            prompt_tokens.append(count(sample.value, METRICS_PAGE, name))
        else:
            value = (share if name in _USAGE else count)(sample.value, METRICS_PAGE, name)
            gauges[engine][name] = max(value, gauges[engine].get(name, 0.0))
    return LoadPage(
        ranks=tuple(
            _rank_sample(rank, gauges[engine], capacities.get(engine)) for rank, engine in enumerate(sorted(gauges))
        ),
        prompt_tokens=count(sum(prompt_tokens), METRICS_PAGE, _PROMPT_TOKENS) if prompt_tokens else None,
    )


def _samples(page: bytes) -> list[Sample]:
    samples = read_samples(page, _NEEDED)
    if not samples:
        raise wrong_shape("/metrics has no vllm: series; is this a vLLM server's page?")
    return samples


def _name(sample: Sample) -> str:
    return sample.name[len("vllm:") :]


def _rank_sample(rank: int, gauges: Mapping[str, float], capacity: int | None) -> RankSample:
    usage = max((gauges[name] for name in _USAGE if name in gauges), default=0.0)
    return RankSample(
        dp_rank=rank,
        used_tokens=round(usage * (capacity or 0)),
        running_requests=round(gauges.get(_RUNNING, 0.0)),
        waiting_requests=round(gauges.get(_WAITING, 0.0)),
        capacity_tokens=capacity,
    )


def _capacity(labels: Mapping[str, str]) -> int | None:
    """Return the KV tokens of a rank. Older releases report only blocks and their size."""
    tokens, blocks, size = (labels.get(name, "") for name in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    if _DIGITS.fullmatch(tokens):
        return count(int(tokens), METRICS_PAGE, "kv_cache_size_tokens")
    if _DIGITS.fullmatch(blocks) and _DIGITS.fullmatch(size):
        return count(int(blocks) * int(size), METRICS_PAGE, "num_gpu_blocks times block_size")
    return None
