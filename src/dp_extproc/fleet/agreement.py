"""Whether configuration, /server_info and the load page tell the same role and number of DP ranks. Pure.

A rank that a server does not have must never be sent: before 0.5.10 it ends the whole server.
"""

from dataclasses import replace
from typing import Final

from dp_extproc.fleet.endpoint import Endpoint, EngineFacts, LoadPage, Mode, Role
from dp_extproc.fleet.observer import FailureKind, ScrapeFailure
from dp_extproc.fleet.server_info import DEFAULT_BOOTSTRAP_PORT, follows_rooms

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
    )


def without_foreign_ranks(page: LoadPage, facts: EngineFacts) -> LoadPage:
    """Leave out samples of ranks that the server says it does not have."""
    if all(sample.dp_rank < facts.dp_ranks for sample in page.ranks):
        return page
    return replace(page, ranks=tuple(sample for sample in page.ranks if sample.dp_rank < facts.dp_ranks))


def disagreement(endpoint: Endpoint, facts: EngineFacts, page: LoadPage | None = None) -> ScrapeFailure | None:
    """Tell how the sources differ, if they do. /server_info wins."""
    if (mode := MODE_OF[endpoint.role]) is not facts.mode:
        remedy = f"start it with --disaggregation-mode {mode}, or move it in the configuration"
        return _disagreement(
            f"its disaggregation_mode is {facts.mode}, but it is configured as {endpoint.role}; {remedy}"
        )
    told = f"the engine has {facts.dp_ranks} DP rank(s) by /server_info"
    if endpoint.dp_size not in {None, facts.dp_ranks}:
        return _disagreement(f"{told}, but dp_size is {endpoint.dp_size} in the configuration; remove or correct it")
    shown = {sample.dp_rank for sample in page.ranks} | set(page.silent_ranks) if page else set[int]()
    if shown and shown != set(range(facts.dp_ranks)):
        foreign = sorted(rank for rank in shown if rank >= facts.dp_ranks)
        detail = f"also shows {_some(foreign)}, which are left out" if foreign else f"shows only {_some(sorted(shown))}"
        return _disagreement(f"{told}, but its load page {detail}")
    return None


def _disagreement(message: str) -> ScrapeFailure:
    return ScrapeFailure(FailureKind.DISAGREEMENT, message)


def _some(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}{', ...' if len(ranks) > 8 else ''}"
