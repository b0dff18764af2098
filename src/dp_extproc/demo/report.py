"""What the demo found, as tables."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dp_extproc.demo.fleet import RankShare
from dp_extproc.demo.probe import LoadProbe
from dp_extproc.demo.traffic import Outcome


@dataclass(frozen=True, slots=True)
class Run:
    """One placement's run over all jobs."""

    placement: str
    seconds: float
    outcomes: Sequence[Outcome]
    shares: Sequence[RankShare]
    probe: LoadProbe

    def imbalance(self, role: str) -> float:
        """Give how full the fullest rank of a server of this role was, against the average rank at that moment."""
        return self.probe.imbalance(sorted({share.server for share in self.shares if share.server.startswith(role)}))


def print_report(console: Console, runs: Sequence[Run]) -> None:
    """Print what each rank got and what the clients saw, run beside run."""
    console.print(_shares_table(runs))
    console.print(_summary_table(runs))
    for run in runs:
        errors = [outcome.error for outcome in run.outcomes if outcome.error is not None]
        if errors:
            console.print(f"{_heading(run)}: {len(errors)} requests failed, such as: {errors[0]}", highlight=False)


def _heading(run: Run) -> str:
    return run.placement


def _shares_table(runs: Sequence[Run]) -> Table:
    table = Table(
        title="What each rank got",
        caption="load: tokens that the rank held or had queued, on average over the run",
        title_justify="left",
    )
    table.add_column("server")
    table.add_column("rank", justify="right")
    for run in runs:
        for column in ("requests", "tokens", "load"):
            table.add_column(f"{_heading(run)}\n{column}" if column == "requests" else f"\n{column}", justify="right")
    servers = list(dict.fromkeys(share.server for share in runs[0].shares))
    for server in servers:
        rows = [[share for share in run.shares if share.server == server] for run in runs]
        for position, first in enumerate(rows[0]):
            ranks = [row[position] for row in rows]
            cells = [text for rank in ranks for text in (f"{rank.requests}", f"{rank.tokens:,}", f"{rank.load:,.0f}")]
            last = position == len(rows[0]) - 1
            table.add_row(server if position == 0 else "", str(first.rank), *cells, end_section=last)
    return table


def _summary_table(runs: Sequence[Run]) -> Table:
    table = Table(title="What it means", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(_heading(run), justify="right")
    baseline = runs[0]
    for label, measure, form in _MEASURES:
        cells = []
        for run in runs:
            value = measure(run)
            change = f" ({(value / measure(baseline) - 1) * 100:+.0f} %)" if run is not baseline else ""
            cells.append(form(value) + change)
        table.add_row(label, *cells)
    return table


def _first_tokens(run: Run) -> list[float]:
    return sorted(outcome.first_token for outcome in run.outcomes if outcome.first_token is not None)


def _per_token(run: Run) -> list[float]:
    return [outcome.per_token for outcome in run.outcomes if outcome.per_token is not None]


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def _milliseconds(value: float) -> str:
    return f"{value * 1000:.0f} ms"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _times(value: float) -> str:
    return f"{value:.2f} x"


_MEASURES: Sequence[tuple[str, Callable[[Run], float], Callable[[float], str]]] = (
    ("fullest prefill rank of a server against its average", lambda run: run.imbalance("prefill"), _times),
    ("fullest decode rank of a server against its average", lambda run: run.imbalance("decode"), _times),
    ("time to first token, mean", lambda run: statistics.mean(_first_tokens(run)), _milliseconds),
    ("time to first token, median", lambda run: statistics.median(_first_tokens(run)), _milliseconds),
    ("time to first token, 99 of 100", lambda run: _quantile(_first_tokens(run), 0.99), _milliseconds),
    ("time per output token, mean", lambda run: statistics.mean(_per_token(run)), _milliseconds),
    ("all requests done after", lambda run: run.seconds, _seconds),
)
