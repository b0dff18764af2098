"""Reads ``GET /v1/loads``, SGLang's own account of its load per DP rank (``entrypoints/v1_loads.py``, from 0.5.8).

Until 0.5.12 the page also has totals over all ranks; they are left alone. Fields came one by one: ``num_total_tokens``
with 0.5.11, ``num_waiting_uncached_tokens`` with 0.5.13, ``decode_moments`` with 0.5.17.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct

from dp_extproc.engines.model import DecodeSteps, LoadPage, RankSample
from dp_extproc.engines.quantities import Amount, Count, Difference, Rank, amount, at_least_zero, count, whole
from dp_extproc.engines.reading import read_json

_NAME: Final = "/v1/loads"
_MOMENTS: Final = 6
"""Sums over the steps of a rank: see :func:`_decoded`."""


class _Disaggregation(Struct):
    prefill_inflight_queue_reqs: Count | None = None


class _RankLoad(Struct):
    dp_rank: Rank
    num_used_tokens: Difference
    timestamp: Amount | None = None
    num_total_tokens: Difference | None = None
    num_waiting_uncached_tokens: Difference | None = None
    num_running_reqs: Count | None = None
    num_waiting_reqs: Count | None = None
    max_total_num_tokens: Count | None = None
    max_running_requests: Count | None = None
    gen_throughput: Amount | None = None
    total_prefill_uncached_tokens: Count | None = None
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
    body = read_json(page, _Page, _NAME)
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
        total_tokens=at_least_zero(load.num_total_tokens),
        waiting_uncached_tokens=at_least_zero(load.num_waiting_uncached_tokens),
        running_requests=(load.num_running_reqs or 0) + (transferring or 0),
        waiting_requests=load.num_waiting_reqs or 0,
        capacity_tokens=load.max_total_num_tokens,
        max_running_requests=load.max_running_requests,
        tokens_per_second=load.gen_throughput,
        decoded=_decoded(load.decode_moments),
        age=_age(printed_at, load.timestamp),
    )


def _decoded(moments: Any) -> DecodeSteps | None:
    """Read the counts of steps, of sequences in them, of microseconds, two squares and products, and of tokens.

    Raises:
        ReaderError: They have the right form, but tell what cannot be.
    """
    if not isinstance(moments, list) or len(moments) != _MOMENTS:
        return None
    if not all(type(each) in {int, float} for each in moments):
        return None
    steps, sequences, micros, _, _, tokens = moments  # the squares outgrow 2**53 in time, and nobody needs them
    return DecodeSteps(
        steps=whole(steps, _NAME, "the steps of decode_moments"),
        sequences=whole(sequences, _NAME, "the sequences of decode_moments"),
        seconds=amount(micros, _NAME, "the microseconds of decode_moments") / 1e6,
        tokens=whole(tokens, _NAME, "the tokens of decode_moments"),
    )


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
    if printed_at is None or published_at is None:
        return None
    return max(0.0, printed_at - published_at)


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up what each rank tells; None when one of them does not."""
    told = list(counts)
    known = [each for each in told if each is not None]
    return count(sum(known), _NAME, "all uncached prompt tokens") if known and len(known) == len(told) else None
