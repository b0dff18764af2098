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
from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dp_extproc.fleet.endpoint import LoadPage, RankSample
from dp_extproc.fleet.reading import unreadable, wrong_shape

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

_LIMIT: Final = 1 << 53
"""No count of tokens comes near; below it integers and floating point agree."""
_MAX_BYTES: Final = 1 << 20
"""Of needed lines; bounds the parser's work to half a second. Real servers print 8 lines of 130 bytes per rank."""
_MAX_LINE_BYTES: Final = 2048
_RANK: Final = re.compile(r"[0-9]{1,6}")

_Gauges = Mapping[str, float]


def read_metrics(page: bytes) -> LoadPage:
    """Read the body of ``GET /metrics``.

    Raises:
        ReaderError: Whatever else the bytes are.
    """
    lines = _needed_lines(page)
    if not lines and not _ANY_OF_SGLANG.search(page):
        raise wrong_shape("/metrics has no sglang: series; is this an SGLang server's page?")
    gauges: dict[int, dict[str, float]] = defaultdict(dict)
    counters: list[Sample] = []
    for sample in _parse(lines):
        if not abs(sample.value) < _LIMIT:  # NaN is not
            raise wrong_shape(f"/metrics says {str(sample.value)[:20]} for {sample.name}")
        name = sample.name[len("sglang:") :]
        if name == _PROMPT_TOKENS:
            counters.append(sample)
        elif sample.labels.get("pp_rank", "0") == "0" and not sample.labels.get("priority"):
            of_rank = gauges[_dp_rank(sample)]
            of_rank[name] = max(sample.value, of_rank.get(name, 0.0))
    return LoadPage(
        ranks=tuple(_rank_sample(rank, gauges[rank]) for rank in sorted(gauges) if _USED in gauges[rank]),
        prompt_tokens=_total(counters),
        silent_ranks=tuple(rank for rank in sorted(gauges) if _USED not in gauges[rank]),
    )


def _needed_lines(page: bytes) -> list[str]:
    lines: list[str] = []
    size = 0
    for match in _NEEDED.finditer(page):
        line = match[0]
        if len(line) > _MAX_LINE_BYTES:
            raise wrong_shape(f"/metrics has a line of {len(line)} bytes: {line[:60]!r}...")
        size += len(line)
        if size > _MAX_BYTES:
            raise wrong_shape(f"/metrics has more than {_MAX_BYTES} bytes about load")
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            raise unreadable(f"/metrics has a line that is not UTF-8: {line[:60]!r}...") from None
    return lines


def _parse(lines: Iterable[str]) -> Iterable[Sample]:
    try:
        families = list(text_string_to_metric_families("\n".join(lines)))
    except (ValueError, LookupError, TypeError) as error:  # what the parser raises on lines it did not foresee
        raise unreadable(f"/metrics is not Prometheus text: {error}") from None
    return (sample for family in families for sample in family.samples)


def _dp_rank(sample: Sample) -> int:
    text = sample.labels.get("dp_rank", "0")
    if not _RANK.fullmatch(text):
        raise wrong_shape(f"/metrics has dp_rank={text[:20]!r} on {sample.name}")
    return int(text)


def _rank_sample(rank: int, gauges: _Gauges) -> RankSample:
    def total(*names: str) -> int:
        return round(sum(gauges.get(name, 0.0) for name in names))

    return RankSample(
        dp_rank=rank,
        used_tokens=round(gauges[_USED]),
        running_requests=total(*_RUNNING),
        waiting_requests=total(*_WAITING) + max(total(name) for name in _BOOTSTRAP),
        capacity_tokens=round(gauges[_CAPACITY]) if _CAPACITY in gauges else None,
        tokens_per_second=max(0.0, gauges[_THROUGHPUT]) if _THROUGHPUT in gauges else None,
    )


def _total(counters: list[Sample]) -> int | None:
    """Sum a counter of the whole server: its series (streaming or not, custom labels) split the total between them.

    A series with an empty priority beside others with one would be the total of those.
    """
    if any(sample.labels.get("priority") == "" for sample in counters):
        counters = [sample for sample in counters if not sample.labels.get("priority")]
    return round(sum(max(0.0, sample.value) for sample in counters)) if counters else None
