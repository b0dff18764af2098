"""Reads ``GET /v1/loads``, SGLang's own account of its load per DP rank (``entrypoints/v1_loads.py``, from 0.5.8).

Until 0.5.12 the page also has totals over all ranks; they are left alone. Fields came one by one: ``num_total_tokens``
with 0.5.11, ``num_waiting_uncached_tokens`` with 0.5.13, ``decode_moments`` with 0.5.17.
"""

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from dp_extproc.fleet.endpoint import DecodeSteps, LoadPage, RankSample
from dp_extproc.fleet.reading import read_json

_LIMIT: Final = 1 << 53
"""No count of tokens comes near; below it integers and floating point agree."""

_Rank = Annotated[int, Meta(ge=0, lt=1_000_000)]
_Count = Annotated[int, Meta(gt=-_LIMIT, lt=_LIMIT)]


class _Disaggregation(Struct):
    prefill_inflight_queue_reqs: _Count | None = None


class _RankLoad(Struct):
    dp_rank: _Rank
    num_used_tokens: _Count
    timestamp: float | None = None
    num_total_tokens: _Count | None = None
    num_waiting_uncached_tokens: _Count | None = None
    num_running_reqs: _Count | None = None
    num_waiting_reqs: _Count | None = None
    max_total_num_tokens: _Count | None = None
    max_running_requests: _Count | None = None
    gen_throughput: float | None = None
    total_prefill_uncached_tokens: _Count | None = None
    disaggregation: _Disaggregation | None = None
    decode_moments: Any = None
    """Made for fitting a line through the times of steps; should it change its form, the rest of the page still counts.
    """


class _Page(Struct):
    loads: list[_RankLoad]
    timestamp: str | None = None


def read_loads(page: bytes) -> LoadPage:
    """Read the body of ``GET /v1/loads``.

    Raises:
        ReaderError: Whatever else the bytes are.
    """
    body = read_json(page, _Page, "/v1/loads")
    printed_at = _seconds(body.timestamp)
    newest: dict[int, _RankLoad] = {}
    silent: set[int] = set()
    for load in body.loads:
        if load.timestamp == 0.0:  # how SGLang's shared memory starts out (``ShmLoadSnapshotWriter``): never published
            silent.add(load.dp_rank)
        elif (known := newest.get(load.dp_rank)) is None or (load.timestamp or 0.0) >= (known.timestamp or 0.0):
            newest[load.dp_rank] = load
    return LoadPage(
        ranks=tuple(_sample(newest[rank], printed_at) for rank in sorted(newest)),
        uncached_prompt_tokens=_sum(load.total_prefill_uncached_tokens for load in newest.values()),
        silent_ranks=tuple(sorted(silent - newest.keys())),
    )


def _sample(load: _RankLoad, printed_at: float | None) -> RankSample:
    # Prefill counts a request whose KV cache is on its way as neither running nor waiting, but keeps its tokens.
    transferring = load.disaggregation.prefill_inflight_queue_reqs if load.disaggregation else None
    return RankSample(
        dp_rank=load.dp_rank,
        used_tokens=max(0, load.num_used_tokens),
        total_tokens=_not_negative(load.num_total_tokens),
        waiting_uncached_tokens=_not_negative(load.num_waiting_uncached_tokens),
        running_requests=max(0, load.num_running_reqs or 0) + max(0, transferring or 0),
        waiting_requests=max(0, load.num_waiting_reqs or 0),
        capacity_tokens=_not_negative(load.max_total_num_tokens),
        max_running_requests=_not_negative(load.max_running_requests),
        tokens_per_second=load.gen_throughput if _is_rate(load.gen_throughput) else None,
        decoded=_decoded(load.decode_moments),
        age=_age(printed_at, load.timestamp),
    )


def _decoded(moments: Any) -> DecodeSteps | None:
    """Read the counts of steps, of sequences in them, of microseconds, two squares and products, and of tokens."""
    try:
        steps, sequences, micros, _, _, tokens = map(float, moments)
    except (TypeError, ValueError, OverflowError):
        return None
    if not all(map(math.isfinite, (steps, sequences, micros, tokens))):
        return None
    return DecodeSteps(steps, sequences, micros / 1e6, tokens)


def _seconds(iso: str | None) -> float | None:
    """Give the page's own time as Unix seconds; None when it has none that can be read."""
    if iso is None:
        return None
    try:
        moment = datetime.fromisoformat(iso)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _age(printed_at: float | None, published_at: float | None) -> float | None:
    """Compare the engine's clock with itself only: it need not agree with ours."""
    if printed_at is None or published_at is None or not math.isfinite(published_at):
        return None
    return max(0.0, printed_at - published_at)


def _is_rate(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up what each rank tells; None when one of them does not."""
    told = list(counts)
    known = [max(0, count) for count in told if count is not None]
    return sum(known) if known and len(known) == len(told) else None


def _not_negative(value: int | None) -> int | None:
    return None if value is None else max(0, value)
