"""Requests reach all pairs of ranks that each release, with each relevant launch option, allows."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import DECODE_RANKS, FAST, PREFILL_RANKS, body_of, one

Pairs = set[tuple[int, int | None]]

ALL: Final[Pairs] = {(p, d) for p in range(PREFILL_RANKS) for d in range(DECODE_RANKS)}
COUPLED: Final[Pairs] = {(p, d) for p, d in ALL if d is not None and (p - d) % 2 == 0}
"""One room determines both ranks, so they are equal modulo the greatest common divisor of 4 and 2."""
NOT_DECODE: Final[Pairs] = {(p, None) for p in range(PREFILL_RANKS)}
"""The engine picks the decode rank."""
FIRST: Final[Pairs] = {(0, d) for d in range(DECODE_RANKS)}
"""Only the first prefill rank works."""

ATTENTION: Final = ("--dp-attention",)
PLAIN: Final = ("--no-dp-attention",)
FORCED: Final = ("--dp-attention", "--force-query")


def method(name: str, attention: Sequence[str] = ATTENTION) -> tuple[str, ...]:
    return (*attention, "--load-balance-method", name)


@dataclass(frozen=True, slots=True)
class Row:
    """Engines, and the pairs of ranks that are reachable on them."""

    name: str
    version: str
    reached: Pairs
    prefill: Sequence[str] = ATTENTION
    decode: Sequence[str] = ATTENTION
    listeners: bool = False


ROWS: Final = (
    Row("0.4.6", "0.4.6", COUPLED),
    Row("0.4.7", "0.4.7", COUPLED),
    Row("0.5.7", "0.5.7", COUPLED),
    Row("0.5.8", "0.5.8", NOT_DECODE),
    Row("0.5.9 decode follows rooms", "0.5.9", COUPLED, decode=method("follow_bootstrap_room")),
    Row("0.5.9 prefill is overridden", "0.5.9", NOT_DECODE, prefill=method("round_robin")),
    Row("0.5.10", "0.5.10", ALL),
    Row("0.5.10 prefill goes round", "0.5.10", ALL, prefill=method("round_robin")),
    Row("0.5.10 plain prefill goes round", "0.5.10", FIRST, prefill=method("round_robin", PLAIN)),
    Row("0.5.11", "0.5.11", ALL),
    Row("0.5.11 plain", "0.5.11", FIRST, prefill=PLAIN, decode=PLAIN),
    Row("0.5.11 forced query", "0.5.11", ALL, prefill=FORCED, decode=FORCED),
    Row("0.5.15 prefill goes round", "0.5.15", ALL, prefill=method("round_robin")),
    Row("0.5.15 plain prefill goes round", "0.5.15", ALL, prefill=method("round_robin", PLAIN)),
    Row("0.5.16 plain", "0.5.16", ALL, prefill=PLAIN, decode=PLAIN),
    Row("0.5.21", "0.5.21", ALL),
    Row("0.5.22 counts replicas", "0.5.22", ALL),
    Row("0.5.22 plain", "0.5.22", ALL, prefill=PLAIN, decode=PLAIN),
    Row("0.5.23 by tokens", "0.5.23", ALL, prefill=method("total_tokens")),
    Row("0.5.23 plain prefill goes round", "0.5.23", ALL, prefill=method("round_robin", PLAIN)),
    Row("0.5.23 forced query", "0.5.23", ALL, prefill=FORCED, decode=FORCED),
    Row("0.5.23 listener per rank", "0.5.23", ALL, listeners=True),
)


@dataclass(slots=True)
class Fleet:
    """All rows behind one Envoy, each as the pool of a model of its name."""

    client: httpx.Client
    service: ServiceProcess
    pools: dict[str, tuple[HostedEngine, HostedEngine]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = HostedEngines()
        pools = {row.name: (_engine(engines, "prefill", row), _engine(engines, "decode", row)) for row in ROWS}
        running.enter_context(engines)
        config = [_pool(row, *pools[row.name]) for row in ROWS]
        service = running.enter_context(
            ServiceProcess(write_config(config, load={"interval": "1s", "timeout": "5s", "stale_after": "30s"}))
        )
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(client, service, pools)


def _engine(engines: HostedEngines, role: str, row: Row) -> HostedEngine:
    ranks = PREFILL_RANKS if role == "prefill" else DECODE_RANKS
    flags = row.prefill if role == "prefill" else row.decode
    options = ["--role", role, "--dp-size", str(ranks), "--sglang-version", row.version, *flags, *FAST]
    if row.listeners:
        return engines.add(*options, "--rank-listeners", listeners=ranks)
    return engines.add(*options)


def _pool(row: Row, prefill: HostedEngine, decode: HostedEngine) -> dict[str, Any]:
    def endpoints(engine: HostedEngine, ranks: int) -> list[dict[str, Any]]:
        if not row.listeners:
            return [{"url": engine.url}]
        urls = [f"http://127.0.0.1:{engine.port + rank}" for rank in range(ranks)]
        return [{"url": url, "dp_rank": rank} for rank, url in enumerate(urls)]

    return {
        "models": [row.name],
        "prefill": {"endpoints": endpoints(prefill, PREFILL_RANKS)},
        "decode": {"endpoints": endpoints(decode, DECODE_RANKS)},
        "policy": {"client_dp_rank": "honour"},
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_allowed_pair_of_ranks_is_reached(fleet: Fleet, row: Row) -> None:
    """Requests for each pair of ranks run where they were requested, or where the engines allow, and none fails."""
    reached: Pairs = set()
    wanted = list(product(range(PREFILL_RANKS), range(DECODE_RANKS)))
    for prefill_rank, decode_rank in wanted * (25 if row.listeners else 1):
        pair = _send(fleet, row, prefill_rank, decode_rank)
        reached.add(pair if row.reached is not NOT_DECODE else (pair[0], None))
        if row.listeners:  # a request cannot choose the engine, so its choice is random
            if reached == row.reached:
                break
        elif row.reached is ALL:
            assert pair == (prefill_rank, decode_rank)

    assert reached == row.reached


def _send(fleet: Fleet, row: Row, prefill_rank: int, decode_rank: int) -> tuple[int, int]:
    prefill, decode = fleet.pools[row.name]
    for engine in (prefill, decode):
        engine.forget()
    body = {
        "model": row.name,
        "text": "a b c",
        "sampling_params": {"max_new_tokens": 2},
        "disagg_prefill_dp_rank": prefill_rank,
        "routed_dp_rank": decode_rank,
    }
    response = fleet.client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    on_prefill, on_decode = one([prefill]), one([decode])
    assert on_prefill["outcome"] == on_decode["outcome"] == "finished"
    assert body_of(on_prefill)["bootstrap_room"] % PREFILL_RANKS == on_prefill["rank"]
    return on_prefill["rank"], on_decode["rank"]


def test_a_rank_listener_gets_no_rank_in_its_body(fleet: Fleet) -> None:
    """If the address selects the rank, the body names only prefill's, which both legs need."""
    _, _ = _send(fleet, ROWS[-1], 0, 0)
    prefill, decode = fleet.pools[ROWS[-1].name]
    rank = one([prefill])["rank"]

    for engine in (prefill, decode):
        body = body_of(one([engine]))
        assert "routed_dp_rank" not in body
        assert body["disagg_prefill_dp_rank"] == rank
