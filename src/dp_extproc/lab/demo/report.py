"""Print the results as tables."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dp_extproc.lab.demo.contest import Run, turns
from dp_extproc.lab.demo.jobs import Job, Outcome, middle_length
from dp_extproc.lab.demo.standin import Received
from dp_extproc.lab.demo.verdict import invalid_because, undersampled

_UNKNOWN: Final = "-"
_CLOSE_PROGRAMS: Final = "Close other programs on this machine, and try again."
_ERRORS_SHOWN: Final = 5
_ERROR_LENGTH: Final = 200
"""Characters of an error that are printed: a router may answer with a page."""


@dataclass(frozen=True, slots=True)
class About:
    """What the tables need besides the numbers."""

    jobs: Sequence[Job]
    engines: Sequence[str]
    """The engines by name. The first word is the role of an engine: ``prefill 1``."""
    is_all_here: bool
    """Whether engines and routers are children of this process."""
    remedy: str
    """What to do when the machine was too busy with what is measured, not with other programs."""


def print_report(console: Console, runs: Sequence[Run], about: About) -> None:
    """Print what each rank got and what the clients measured, run beside run, and whether the numbers are valid."""
    reasons = invalid_because(runs, is_all_here=about.is_all_here)
    if about.engines:
        console.print(_ranks_table(runs, about))
    console.print(_summary_table(runs, about, is_invalid=bool(reasons)))
    if reasons:
        _print(console, "[bold]Do not compare these times: this machine was too busy.[/]")
        _print(console, *(escape(reason.text) for reason in reasons))
        _print(console, _CLOSE_PROGRAMS if any(reason.is_external for reason in reasons) else about.remedy)
    if any(run.spent.share().busy is None for run in runs):
        _print(console, "How busy this machine was cannot be measured here: it has no /proc/stat that counts.")
    _print(console, *map(escape, undersampled(runs, about.engines)))
    for run in runs:
        _print_failures(console, run)


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False)


def _print_failures(console: Console, run: Run) -> None:
    errors = Counter(outcome.error[:_ERROR_LENGTH] for outcome in run.outcomes if outcome.error is not None)
    if not errors:
        return
    _print(console, f"{escape(run.name)}: {errors.total()} requests failed; the times are of the others.")
    for error, count in errors.most_common(_ERRORS_SHOWN):
        _print(console, f"  {count} x {escape(error)}")
    if len(errors) > _ERRORS_SHOWN:
        _print(console, f"  and {len(errors) - _ERRORS_SHOWN} other kinds")


def _ranks_table(runs: Sequence[Run], about: About) -> Table:
    shows_received = all(run.account is not None for run in runs)
    received = ", requests and prompt tokens: what it received" if shows_received else ""
    table = Table(
        title="What each rank got",
        caption=f"load: tokens that the rank held or had queued, on average over the run{received}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("server")
    table.add_column("rank", justify="right")
    columns = ("requests", "tokens", "load") if shows_received else ("load",)
    for run in runs:
        for column in columns:
            table.add_column(
                f"{escape(run.name)}\n{column}" if column == columns[0] else f"\n{column}", justify="right"
            )
    for engine in about.engines:
        ranks = _ranks(engine, runs)
        if not ranks:
            table.add_row(escape(engine), _UNKNOWN, *[_UNKNOWN] * len(columns) * len(runs), end_section=True)
        for rank in ranks:
            cells = [cell for run in runs for cell in _rank_cells(run, engine, rank, with_received=shows_received)]
            table.add_row(escape(engine) if rank == ranks[0] else "", str(rank), *cells, end_section=rank == ranks[-1])
    return table


def _ranks(engine: str, runs: Sequence[Run]) -> list[int]:
    """List the ranks of an engine that were sampled, or that received requests."""
    known: set[tuple[str, int]] = set()
    for run in runs:
        known |= run.probe.tokens.keys()
        known |= run.account.received.keys() if run.account is not None else set()
    return sorted(rank for name, rank in known if name == engine)


def _rank_cells(run: Run, engine: str, rank: int, *, with_received: bool) -> list[str]:
    load = run.probe.mean_tokens(engine, rank)
    cells = [_UNKNOWN if load is None else f"{load:,.0f}"]
    if with_received and run.account is not None:
        got = run.account.received.get((engine, rank), Received())
        cells = [f"{got.requests:,}", f"{got.tokens:,}", *cells]
    return cells


def _summary_table(runs: Sequence[Run], about: About, *, is_invalid: bool) -> Table:
    title = "What it means"
    table = Table(
        title=f"{title} - NOTHING: the machine was too busy, see below" if is_invalid else title,
        caption=_caption(runs, about),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.name), justify="right")
    baseline = runs[0]
    for label, measure, form in _measures(about):
        values = [measure(run) for run in runs]
        cells = []
        for run, value in zip(runs, values, strict=True):
            known = _UNKNOWN if value is None else form(value)
            cells.append(known + (_change(value, values[0]) if run is not baseline else ""))
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("failed requests", *(f"{sum(o.error is not None for o in run.outcomes):,}" for run in runs))
    for label, share in _machine(about):
        table.add_row(label, *(share(run) for run in runs))
    return table


def _change(value: float | None, baseline: float | None) -> str:
    return f" ({(value / baseline - 1) * 100:+.0f} %)" if value is not None and baseline else ""


def _caption(runs: Sequence[Run], about: About) -> str:
    middle = middle_length(about.jobs)
    lines = [
        f"{len(about.jobs):,} requests for each, every other one streamed.",
        f"Long ones have more than {middle:,.0f} tokens of prompt and output together; those are half of them.",
    ]
    order = [escape(runs[who].name) for who, _ in turns(len(runs), about.jobs)]
    if len(runs) > 1:
        lines[0] = f"The same {lines[0]} Sent in halves, in the order: {', '.join(order)}."
    return " ".join(lines)


Measure = tuple[str, Callable[[Run], float | None], Callable[[float], str]]


def _measures(about: About) -> list[Measure]:
    middle = middle_length(about.jobs)
    roles = dict.fromkeys(engine.split(maxsplit=1)[0] for engine in about.engines)
    return [
        *(
            (f"fullest {escape(role)} rank of a server against its average", _imbalance(about, role), "{:.2f} x".format)
            for role in roles
        ),
        ("time to first token, mean", lambda run: _mean(_first_tokens(run)), _milliseconds),
        ("time to first token, median", lambda run: _quantile(_first_tokens(run), 0.5), _milliseconds),
        ("time to first token, 99 of 100", lambda run: _quantile(_first_tokens(run), 0.99), _milliseconds),
        ("time per output token, mean", lambda run: _mean(_per_token(run)), _fine_milliseconds),
        (
            "time per output token of long requests, mean",
            lambda run: _mean(_per_token(run, lambda job: job.tokens > middle)),
            _fine_milliseconds,
        ),
        (
            "time per output token of short requests, mean",
            lambda run: _mean(_per_token(run, lambda job: job.tokens <= middle)),
            _fine_milliseconds,
        ),
        ("all requests done after", lambda run: run.seconds, "{:.1f} s".format),
    ]


def _imbalance(about: About, role: str) -> Callable[[Run], float | None]:
    engines = [engine for engine in about.engines if engine.split(maxsplit=1)[0] == role]
    return lambda run: run.probe.imbalance(engines)


def _machine(about: About) -> Iterable[tuple[str, Callable[[Run], str]]]:
    yield "this machine's processors, busy", lambda run: _share(run.spent.share().busy)
    if about.is_all_here:
        yield "this machine's processors, used by other programs", lambda run: _share(run.spent.share().external)
    yield "the client, of one processor", lambda run: _share(run.spent.share().client)
    yield (
        "engines' steps, longer than they should be",
        lambda run: _share(None if run.account is None else run.account.late_share),
    )


def _share(value: float | None) -> str:
    return "not measurable here" if value is None else f"{value:.0%}"


def _answered(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if outcome.error is None]


def _first_tokens(run: Run) -> list[float]:
    return sorted(outcome.first_token for outcome in _answered(run) if outcome.first_token is not None)


def _per_token(run: Run, counts: Callable[[Job], bool] = lambda _: True) -> list[float]:
    return [each.per_token for each in _answered(run) if each.per_token is not None and counts(each.job)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(len(values) * share))] if values else None


def _milliseconds(value: float) -> str:
    return f"{value * 1000:,.0f} ms"


def _fine_milliseconds(value: float) -> str:
    return f"{value * 1000:,.1f} ms"
