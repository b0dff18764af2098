"""Decide whether results are valid for placement, or only show a busy machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dp_extproc.lab.demo.contest import Run
from dp_extproc.lab.demo.machine import Share
from dp_extproc.lab.demo.standin import Account

_EXTERNAL: Final = 0.10
"""Share of all processors that other programs may use. Placement changes most times by 10 to 30 %; on two processors
this much takes a fifth of one away, now from one placement and now from the other."""
_BUSY: Final = 0.90
"""Share of all processors that may be busy. Above it a process waits for a processor longer than it runs."""
_CLIENT: Final = 0.90
"""Share of one processor that the client may use, as it runs on one only. Above it the client reads answers late."""
_LATE: Final = 0.02
"""How much longer the steps of the engines may take than they should: time per output token grows by as much, and what
placement gains there is not more."""
_UNSAMPLED: Final = 0.05
"""Share of the samples of an engine that may fail: with more than one in twenty the averages miss a part."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why times must not be compared."""

    text: str
    is_external: bool = False
    """Whether other programs are the cause: slower engines would not help then."""


def invalid_because(runs: Sequence[Run], *, is_all_here: bool) -> list[Reason]:
    """Return why times of these runs must not be compared; empty when they may be.

    Args:
        runs: The runs, with what was measured during them.
        is_all_here: Whether engines and routers are children of this process; else other programs cannot be measured.
    """
    return [
        replace(reason, text=f"{run.name}: {reason.text}")
        for run in runs
        for reason in _reasons(run.spent.share(), run.account, is_all_here=is_all_here)
    ]


def undersampled(runs: Sequence[Run], engines: Sequence[str]) -> list[str]:
    """Describe the engines whose load was not sampled for much of the time."""
    return [
        f"{run.name}: {run.probe.failed.get(engine, 0)} of "
        f"{run.probe.failed.get(engine, 0) + run.probe.samples.get(engine, 0)} looks at the load of {engine} failed: "
        f"{run.probe.reasons.get(engine, 'it was never looked at')}"
        for run in runs
        for engine in engines
        if run.probe.failed_share(engine) > _UNSAMPLED
    ]


def _reasons(share: Share, account: Account | None, *, is_all_here: bool) -> Iterator[Reason]:
    if is_all_here and share.external is not None and share.external > _EXTERNAL:
        text = f"other programs used {share.external:.0%} of the processors (limit: {_EXTERNAL:.0%})"
        yield Reason(text, is_external=True)
    if share.busy is not None and share.busy > _BUSY:
        yield Reason(f"the processors were {share.busy:.0%} busy (limit: {_BUSY:.0%})")
    if share.client > _CLIENT:
        yield Reason(f"the client used {share.client:.0%} of one processor (limit: {_CLIENT:.0%})")
    if account is not None and account.late_share > _LATE:
        yield Reason(f"the engines' steps took {account.late_share:.0%} longer than they should (limit: {_LATE:.0%})")
