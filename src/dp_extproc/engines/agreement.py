"""Makes configuration, facts and load page of an engine agree on its DP ranks, and reports where they differ. Pure.

A request must never name a rank that the engine does not have: SGLang before 0.5.10 ends the whole process then.
"""

from dataclasses import dataclass, replace
from typing import Final, Self

from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage


def as_single_rank(facts: EngineFacts, endpoint: Endpoint) -> EngineFacts:
    """Turn the facts of an engine into those of the one rank behind the endpoint, if it is configured with one."""
    if endpoint.dp_rank is None:
        return facts
    return replace(facts, dp_ranks=1, single_rank=(endpoint.dp_rank, endpoint.dp_size or facts.dp_ranks))


def page_of_single_rank(page: LoadPage, facts: EngineFacts) -> LoadPage:
    """Keep the sample of the endpoint's only rank, as rank 0. The page may have that rank alone, or all."""
    if facts.single_rank is None:
        return page
    own = page.ranks if len(page.ranks) == 1 else [each for each in page.ranks if each.dp_rank == facts.single_rank[0]]
    return replace(page, ranks=tuple(replace(each, dp_rank=0) for each in own), unpublished_ranks=())


def without_unknown_ranks(page: LoadPage, facts: EngineFacts) -> LoadPage:
    """Leave out samples of ranks that the engine does not have by its facts."""
    return replace(page, ranks=tuple(sample for sample in page.ranks if sample.dp_rank < facts.dp_ranks))


def disagreement(endpoint: Endpoint, facts: EngineFacts, page: LoadPage | None = None) -> EngineFailure | None:
    """Describe how configuration, facts and load page differ, if they do. The facts count."""
    conflict = adapter_of(facts.kind).role_conflict(facts, endpoint.role) or _rank_conflict(endpoint, facts, page)
    return None if conflict is None else EngineFailure(FailureKind.DISAGREEMENT, conflict)


def contradiction(facts: EngineFacts, page: LoadPage) -> str | None:
    """Explain by what a load page cannot be of the engine with these facts; None if it can.

    The page of SGLang has its release and the present role (``/pd_role_switch`` changes it), each if it reports them.
    """
    ranks = {sample.dp_rank for sample in page.ranks} | set(page.unpublished_ranks)
    if ranks and ranks != set(range(facts.dp_ranks)):
        return f"its load page shows {_some(sorted(ranks))} of {facts.dp_ranks}; its facts are read anew"
    if None not in {page.version, facts.version} and page.version != facts.version:
        return f"its load page is of release {page.version}, not {facts.version}; its facts are read anew"
    if page.mode is not None and page.mode is not facts.mode:
        return f"its load page is of disaggregation_mode {page.mode}, not {facts.mode}; its facts are read anew"
    return None


@dataclass(frozen=True, slots=True)
class Counts:
    """The running counts of an engine, each None before a page had it. They fall only if the engine begins anew."""

    prompt_tokens: float | None = None
    uncached_prompt_tokens: float | None = None
    decode_steps: float | None = None

    def after(self, page: LoadPage) -> Self:
        """Return the counts after a page; one that the page has not stays."""
        decoded = [sample.decoded.steps for sample in page.ranks if sample.decoded is not None]
        is_whole = len(decoded) == len(page.ranks) and not page.unpublished_ranks
        return replace(
            self,
            prompt_tokens=_or(page.prompt_tokens, self.prompt_tokens),
            uncached_prompt_tokens=_or(page.uncached_prompt_tokens, self.uncached_prompt_tokens),
            decode_steps=_or(sum(decoded) if is_whole else None, self.decode_steps),
        )

    def fell(self, later: "Counts") -> str | None:
        """Explain which of the counts is lower in later ones; None if none is."""
        for name in ("prompt_tokens", "uncached_prompt_tokens", "decode_steps"):
            before, now = getattr(self, name), getattr(later, name)
            if before is not None and now is not None and now < before:
                return f"its count of {name.replace('_', ' ')} began anew; its facts are read anew"
        return None


NO_COUNTS: Final = Counts()


def _or(value: float | None, before: float | None) -> float | None:
    return before if value is None else value


def _rank_conflict(endpoint: Endpoint, facts: EngineFacts, page: LoadPage | None) -> str | None:
    reported = f"the engine has {facts.dp_ranks} DP rank(s) by {adapter_of(facts.kind).facts_page}"
    if facts.single_rank is not None:
        rank, ranks = facts.single_rank
        if rank >= ranks:
            return f"the server has {ranks} DP rank(s), but this is to be the listener of rank {rank}"
    elif endpoint.dp_size not in {None, facts.dp_ranks}:
        return f"{reported}, but dp_size is {endpoint.dp_size} in the configuration; remove or correct it"
    on_page = sorted({sample.dp_rank for sample in page.ranks} | set(page.unpublished_ranks)) if page else []
    if not on_page or on_page == list(range(facts.dp_ranks)):
        return None
    if unknown := [rank for rank in on_page if rank >= facts.dp_ranks]:
        return f"{reported}, but its load page also shows {_some(unknown)}, which are left out"
    shown = f"{reported}, but its load page shows only {_some(on_page)}"
    if len(on_page) > 1:
        return shown
    return (
        f"{shown}; if each rank has a listener of its own, list every one of them, this one with dp_rank: {on_page[0]}"
    )


def _some(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}{', ...' if len(ranks) > 8 else ''}"
