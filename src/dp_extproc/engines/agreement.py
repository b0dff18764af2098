"""Whether configuration, /server_info and the load page tell the same role and number of DP ranks. Pure.

A rank that a server does not have must never be sent: before 0.5.10 it ends the whole server.
"""

from dataclasses import replace
from typing import Final

from dp_extproc.config.pools import Engine
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, Kind, LoadPage, Mode, Role
from dp_extproc.engines.sglang.server_info import DEFAULT_BOOTSTRAP_PORT, follows_rooms

MODE_OF: Final = {Role.PREFILL: Mode.PREFILL, Role.DECODE: Mode.DECODE, Role.WORKER: Mode.UNIFIED}
"""The ``disaggregation_mode`` that an engine of each role must have."""


def configured_facts(endpoint: Endpoint) -> EngineFacts | None:
    """Make do with the configuration for an engine whose /server_info cannot be used; None if it tells too little."""
    if endpoint.dp_size is None:
        return None
    mode = MODE_OF[endpoint.role]
    return EngineFacts(
        version=None,
        dp_ranks=endpoint.dp_size,
        mode=mode,
        dp_attention=False,
        served_model=None,
        bootstrap_port=endpoint.bootstrap_port or DEFAULT_BOOTSTRAP_PORT,
        load_balance_method=None,
        follows_rooms=follows_rooms(None, mode, None),
        kind=Kind.VLLM if endpoint.engine is Engine.VLLM else Kind.SGLANG,
    )


def of_listener(facts: EngineFacts, endpoint: Endpoint) -> EngineFacts:
    """See a rank that has a listener of its own as a server of one rank, which knows its place in the whole one."""
    if endpoint.dp_rank is None:
        return facts
    return replace(facts, dp_ranks=1, listener=(endpoint.dp_rank, endpoint.dp_size or facts.dp_ranks))


def page_of_listener(page: LoadPage, facts: EngineFacts) -> LoadPage:
    """Keep what a load page tells of the listener's own rank, as rank 0; it may show that one only, or all."""
    if facts.listener is None:
        return page
    own = page.ranks if len(page.ranks) == 1 else [each for each in page.ranks if each.dp_rank == facts.listener[0]]
    return replace(page, ranks=tuple(replace(each, dp_rank=0) for each in own), silent_ranks=())


def without_foreign_ranks(page: LoadPage, facts: EngineFacts) -> LoadPage:
    """Leave out samples of ranks that the server says it does not have."""
    if all(sample.dp_rank < facts.dp_ranks for sample in page.ranks):
        return page
    return replace(page, ranks=tuple(sample for sample in page.ranks if sample.dp_rank < facts.dp_ranks))


def disagreement(endpoint: Endpoint, facts: EngineFacts, page: LoadPage | None = None) -> EngineFailure | None:
    """Tell how the sources differ, if they do. /server_info wins."""
    if facts.kind is Kind.VLLM and endpoint.role is not Role.WORKER:
        return _disagreement(
            f"it is a vLLM server, which cannot be the {endpoint.role} side: its KV connectors run prefill before "
            "decode, and both legs are sent at once; list it under workers"
        )
    if (mode := MODE_OF[endpoint.role]) is not facts.mode:
        remedy = f"start it with --disaggregation-mode {mode}, or move it in the configuration"
        return _disagreement(
            f"its disaggregation_mode is {facts.mode}, but it is configured as {endpoint.role}; {remedy}"
        )
    page_of_facts = "/metrics" if facts.kind is Kind.VLLM else "/server_info"
    told = f"the engine has {facts.dp_ranks} DP rank(s) by {page_of_facts}"
    if facts.listener is not None:
        rank, ranks = facts.listener
        if rank >= ranks:
            return _disagreement(f"the server has {ranks} DP rank(s), but this is to be the listener of rank {rank}")
    elif endpoint.dp_size not in {None, facts.dp_ranks}:
        return _disagreement(f"{told}, but dp_size is {endpoint.dp_size} in the configuration; remove or correct it")
    shown = {sample.dp_rank for sample in page.ranks} | set(page.silent_ranks) if page else set[int]()
    if shown and shown != set(range(facts.dp_ranks)):
        foreign = sorted(rank for rank in shown if rank >= facts.dp_ranks)
        detail = f"also shows {_some(foreign)}, which are left out" if foreign else f"shows only {_some(sorted(shown))}"
        if len(shown) == 1 and not foreign:
            (rank,) = shown
            detail += f"; if each rank has a listener of its own, list every one of them, this one with dp_rank: {rank}"
        return _disagreement(f"{told}, but its load page {detail}")
    return None


def _disagreement(message: str) -> EngineFailure:
    return EngineFailure(FailureKind.DISAGREEMENT, message)


def _some(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}{', ...' if len(ranks) > 8 else ''}"
