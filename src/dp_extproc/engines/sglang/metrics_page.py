"""Reads an SGLang engine's Prometheus page, ``GET /metrics``.

The page of a real server with two ranks is 110 to 170 kB, nearly all of it histograms; only the lines that are
needed reach the parser. Rules for them (``observability/metrics_collector.py``):

- ``dp_rank`` is there only when the server has several; without it the rank is 0.
- Several schedulers of one rank may export the same gauge, and some gauges come from every tensor-parallel rank.
  They tell the same, so the maximum counts, never the sum; and of pipeline ranks only the first.
- With priority scheduling there is one series per priority; the total has the empty one.
- Names have a colon. Collectors in between like to make it an underscore.

Gauges have no time stamp and may be as old as SGLang likes: a decode rank refreshes them every 40 steps.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from prometheus_client.samples import Sample

from dp_extproc.engines.model import LoadPage, RankSample
from dp_extproc.engines.pages import PAGE, needed_lines, parse_samples, rank_of
from dp_extproc.engines.quantities import amount, count, difference
from dp_extproc.engines.reading import wrong_shape

_USED: Final = "num_used_tokens"
_CAPACITY: Final = "max_total_num_tokens"
_RUNNING: Final = ("num_running_reqs", "num_prefill_inflight_queue_reqs")
_BOOTSTRAP: Final = ("num_prefill_bootstrap_queue_reqs", "num_prefill_prealloc_queue_reqs")
"""The same queue: the first from 0.5.11 on, the second before."""
_WAITING: Final = ("num_queue_reqs", "num_decode_prealloc_queue_reqs", "num_decode_transfer_queue_reqs")
_THROUGHPUT: Final = "gen_throughput"
_PROMPT_TOKENS: Final = "prompt_tokens_total"

_NEEDED: Final = re.compile(
    rb"^sglang[:_](?:%b)[{ \t][^\n]*"
    % b"|".join(
        name.encode() for name in (_USED, _CAPACITY, _THROUGHPUT, *_RUNNING, *_BOOTSTRAP, *_WAITING, _PROMPT_TOKENS)
    ),
    re.MULTILINE,
)
_ANY_OF_SGLANG: Final = re.compile(rb"^(?:# (?:HELP|TYPE) )?sglang[:_]", re.MULTILINE)

_Gauges = Mapping[str, float]


def read_metrics(page: bytes) -> LoadPage:
    """Read the body of ``GET /metrics``.

    Raises:
        ReaderError: Whatever else the bytes are.
    """
    lines = needed_lines(page, _NEEDED)
    if not lines and not _ANY_OF_SGLANG.search(page):
        raise wrong_shape("/metrics has no sglang: series; is this an SGLang server's page?")
    gauges: dict[int, dict[str, float]] = defaultdict(dict)
    counters: list[Sample] = []
    for sample in parse_samples(lines):
        name = sample.name[len("sglang:") :]
        if name == _PROMPT_TOKENS:
            counters.append(sample)
        elif sample.labels.get("pp_rank", "0") == "0" and not sample.labels.get("priority"):
            of_rank = gauges[rank_of(sample, "dp_rank")]
            of_rank[name] = max(_value(name, sample.value), of_rank.get(name, 0.0))
    return LoadPage(
        ranks=tuple(_rank_sample(rank, gauges[rank]) for rank in sorted(gauges) if _USED in gauges[rank]),
        prompt_tokens=_total(counters),
        silent_ranks=tuple(rank for rank in sorted(gauges) if _USED not in gauges[rank]),
    )


def _value(name: str, value: float) -> float:
    if name == _THROUGHPUT:
        return amount(value, PAGE, name)
    return difference(value, PAGE, name) if name == _USED else count(value, PAGE, name)


def _rank_sample(rank: int, gauges: _Gauges) -> RankSample:
    def total(*names: str) -> int:
        return round(sum(gauges.get(name, 0.0) for name in names))

    return RankSample(
        dp_rank=rank,
        used_tokens=round(gauges[_USED]),
        running_requests=total(*_RUNNING),
        waiting_requests=total(*_WAITING) + max(total(name) for name in _BOOTSTRAP),
        capacity_tokens=round(gauges[_CAPACITY]) if _CAPACITY in gauges else None,
        tokens_per_second=gauges.get(_THROUGHPUT),
    )


def _total(counters: list[Sample]) -> int | None:
    """Sum a counter of the whole server: its series (streaming or not, custom labels) split the total between them.

    A series with an empty priority beside others with one would be the total of those.
    """
    if any(sample.labels.get("priority") == "" for sample in counters):
        counters = [sample for sample in counters if not sample.labels.get("priority")]
    parts = [count(sample.value, PAGE, sample.name) for sample in counters]
    return count(sum(parts), PAGE, _PROMPT_TOKENS) if parts else None
