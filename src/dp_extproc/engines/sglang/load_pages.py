"""Reads the two pages on which an SGLang engine reports the load of its DP ranks.

``GET /v1/loads`` (``entrypoints/v1_loads.py``, from 0.5.8 on). Until 0.5.12 it also has totals over all ranks, which
are ignored. Fields were added one by one: ``num_total_tokens`` with 0.5.11, ``num_waiting_uncached_tokens`` with
0.5.13, ``decode_moments`` and the ``total_prefill_*`` counts with 0.5.17.

``GET /metrics`` (``observability/metrics_collector.py``). The page of a real engine with two ranks is 110 to 170 kB,
nearly all of it histograms; only the lines that are needed reach the parser. Rules for them:

- ``dp_rank`` is there only when the engine has several ranks; without it the rank is 0.
- Several schedulers of one rank may export the same gauge, and some gauges come from every tensor-parallel rank.
  Their values are the same, so the maximum counts, never the sum; of pipeline ranks only the first counts.
- With priority scheduling there is one series per priority; the total has the empty one.

Gauges have no time stamp and their age is not bounded: a decode rank refreshes them every 40 steps.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct
from prometheus_client.samples import Sample

from dp_extproc.engines.model import DecodeSteps, LoadPage, Mode, PrefillSteps, RankSample, parse_version
from dp_extproc.engines.pages import METRICS_PAGE, lines_of, rank_of, read_json, read_samples, wrong_shape
from dp_extproc.engines.quantities import (
    Amount,
    Count,
    Rank,
    SignedCount,
    amount,
    at_least_zero,
    count,
    signed_count,
    whole,
)

LOADS_PAGE: Final = "/v1/loads"
_MODES: Final = {mode.value: mode for mode in Mode}
_MOMENTS: Final = 6
"""Number of sums in ``decode_moments``; see :func:`_decoded`."""

_USED: Final = "num_used_tokens"
_CAPACITY: Final = "max_total_num_tokens"
_RUNNING: Final = ("num_running_reqs", "num_prefill_inflight_queue_reqs")
_BOOTSTRAP: Final = ("num_prefill_bootstrap_queue_reqs", "num_prefill_prealloc_queue_reqs")
"""Two names of the same queue: the first from 0.5.11 on, the second before."""
_WAITING: Final = ("num_queue_reqs", "num_decode_prealloc_queue_reqs", "num_decode_transfer_queue_reqs")
_THROUGHPUT: Final = "gen_throughput"
_PROMPT_TOKENS: Final = "prompt_tokens_total"
_CACHED_TOKENS: Final = "cached_tokens_total"
"""Absent while no prompt had cached tokens. From 0.5.9 on it has a series for each ``cache_source``."""

_COUNTERS: Final = (_PROMPT_TOKENS, _CACHED_TOKENS)
_NEEDED: Final = lines_of("sglang", (_USED, _CAPACITY, _THROUGHPUT, *_RUNNING, *_BOOTSTRAP, *_WAITING, *_COUNTERS))
_ANY_OF_SGLANG: Final = re.compile(rb"^(?:# (?:HELP|TYPE) )?sglang[:_]", re.MULTILINE)


class _Disaggregation(Struct):
    mode: Any = None
    prefill_inflight_queue_reqs: Count | None = None


class _RankLoad(Struct):
    dp_rank: Rank
    num_used_tokens: SignedCount
    timestamp: Amount | None = None
    num_total_tokens: SignedCount | None = None
    num_waiting_uncached_tokens: SignedCount | None = None
    num_running_reqs: Count | None = None
    num_waiting_reqs: Count | None = None
    max_total_num_tokens: Count | None = None
    max_running_requests: Count | None = None
    gen_throughput: Amount | None = None
    total_prefill_uncached_tokens: Count | None = None
    total_prefill_busy_us: Amount | None = None
    disaggregation: _Disaggregation | None = None
    decode_moments: Any = None
    """Any JSON: the rest of the page counts also if this list, made for a line fit of step times, changes its form."""


class _Page(Struct):
    loads: list[_RankLoad]
    timestamp: str | None = None
    version: Any = None


def read_loads(page: bytes) -> LoadPage:
    """Read the body of ``GET /v1/loads``, or raise :class:`dp_extproc.engines.pages.ReaderError`."""
    body = read_json(page, _Page, LOADS_PAGE)
    printed_at = _seconds(body.timestamp)
    newest: dict[int, _RankLoad] = {}
    unpublished: set[int] = set()
    for load in body.loads:
        if load.timestamp == 0.0:  # the initial state of SGLang's shared memory (``ShmLoadSnapshotWriter``)
            unpublished.add(load.dp_rank)
        elif (other := newest.get(load.dp_rank)) is None or (load.timestamp or 0.0) >= (other.timestamp or 0.0):
            newest[load.dp_rank] = load
    return LoadPage(
        ranks=tuple(_sample(newest[rank], printed_at) for rank in sorted(newest)),
        uncached_prompt_tokens=_sum(load.total_prefill_uncached_tokens for load in newest.values()),
        unpublished_ranks=tuple(sorted(unpublished - newest.keys())),
        version=parse_version(body.version),
        mode=_mode(newest.values()),
    )


def _mode(loads: Iterable[_RankLoad]) -> Mode | None:
    """Return the mode of all ranks; None if one reports none or another one, as for a moment of a switch."""
    modes = {load.disaggregation.mode if load.disaggregation else None for load in loads}
    only = modes.pop() if len(modes) == 1 else None
    return _MODES.get(only) if isinstance(only, str) else None


def _sample(load: _RankLoad, printed_at: float | None) -> RankSample:
    # Prefill counts a request in transfer as neither running nor waiting, but its tokens as used.
    transferring = load.disaggregation.prefill_inflight_queue_reqs if load.disaggregation else None
    return RankSample(
        dp_rank=load.dp_rank,
        used_tokens=max(0, load.num_used_tokens),
        total_tokens=at_least_zero(load.num_total_tokens),
        waiting_uncached_tokens=at_least_zero(load.num_waiting_uncached_tokens),
        running_requests=(load.num_running_reqs or 0) + (transferring or 0),
        waiting_requests=load.num_waiting_reqs or 0,
        capacity_tokens=load.max_total_num_tokens,
        max_running_requests=load.max_running_requests,
        tokens_per_second=load.gen_throughput,
        decoded=_decoded(load.decode_moments),
        prefilled=_prefilled(load),
        age=_age(printed_at, load.timestamp),
    )


def _prefilled(load: _RankLoad) -> PrefillSteps | None:
    tokens, micros = load.total_prefill_uncached_tokens, load.total_prefill_busy_us
    return None if tokens is None or micros is None else PrefillSteps(tokens, micros / 1e6)


def _decoded(moments: Any) -> DecodeSteps | None:
    """Read the sums of steps, sequences and microseconds, two more sums for a line fit, and the sum of tokens.

    A value of another form counts as absent. An impossible number in one of the right form raises ``ReaderError``.
    """
    if not isinstance(moments, list) or len(moments) != _MOMENTS or {*map(type, moments)} - {int, float}:
        return None
    steps, sequences, micros, _, _, tokens = moments  # the squares exceed 2**53 in time, and are not used
    return DecodeSteps(
        steps=whole(steps, LOADS_PAGE, "the steps of decode_moments"),
        sequences=whole(sequences, LOADS_PAGE, "the sequences of decode_moments"),
        seconds=amount(micros, LOADS_PAGE, "the microseconds of decode_moments") / 1e6,
        tokens=whole(tokens, LOADS_PAGE, "the tokens of decode_moments"),
    )


def _seconds(iso: str | None) -> float | None:
    """Return the page's own time in Unix seconds; None if it has none or a malformed one."""
    if iso is None:
        return None
    try:
        moment = datetime.fromisoformat(iso)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _age(printed_at: float | None, published_at: float | None) -> float | None:
    """Subtract two times of the engine's clock, which need not agree with the clock of the service."""
    if printed_at is None or published_at is None:
        return None
    return max(0.0, printed_at - published_at)


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up a count of all ranks; None if a rank has none."""
    every = list(counts)
    known = [each for each in every if each is not None]
    return count(sum(known), LOADS_PAGE, "all uncached prompt tokens") if known and len(known) == len(every) else None


def read_metrics(page: bytes) -> LoadPage:
    """Read the body of ``GET /metrics``, or raise :class:`dp_extproc.engines.pages.ReaderError`."""
    samples = read_samples(page, _NEEDED)
    if not samples and not _ANY_OF_SGLANG.search(page):
        raise wrong_shape("/metrics has no sglang: series; is this an SGLang server's page?")
    gauges: dict[int, dict[str, float]] = defaultdict(dict)
    counters: dict[str, list[Sample]] = {name: [] for name in _COUNTERS}
    for sample in samples:
        name = sample.name[len("sglang:") :]
        if name in counters:
            counters[name].append(sample)
        elif sample.labels.get("pp_rank", "0") == "0" and not sample.labels.get("priority"):
            of_rank = gauges[rank_of(sample, "dp_rank")]
            of_rank[name] = max(_value(name, sample.value), of_rank.get(name, 0.0))
    prompts = _total(counters[_PROMPT_TOKENS])
    return LoadPage(
        ranks=tuple(_rank_sample(rank, gauges[rank]) for rank in sorted(gauges) if _USED in gauges[rank]),
        prompt_tokens=prompts,
        cached_prompt_tokens=None if prompts is None else _total(counters[_CACHED_TOKENS]) or 0,
        unpublished_ranks=tuple(rank for rank in sorted(gauges) if _USED not in gauges[rank]),
    )


def _value(name: str, value: float) -> float:
    if name == _THROUGHPUT:
        return amount(value, METRICS_PAGE, name)
    return signed_count(value, METRICS_PAGE, name) if name == _USED else count(value, METRICS_PAGE, name)


def _rank_sample(rank: int, gauges: Mapping[str, float]) -> RankSample:
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
    """Add up the series of a counter, into which the total of the engine is split (by streaming, by custom labels).

    With priority scheduling, the series with an empty priority is the total of the others and is left out.
    """
    if any(sample.labels.get("priority") == "" for sample in counters):
        counters = [sample for sample in counters if not sample.labels.get("priority")]
    parts = [count(sample.value, METRICS_PAGE, sample.name) for sample in counters]
    return count(sum(parts), METRICS_PAGE, counters[0].name) if parts else None
