"""Show the runs as a table, as JSON, and as plots."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from bench.balance.contenders import DEFAULT, ENGINES_OWN
from bench.balance.recorded import RecordedRun, read_runs
from bench.balance.runs import Run
from dp_extproc.lab.workload.comparison import Change, change

mpl.use("svg")
from matplotlib import pyplot as plt

MEASURES: Final = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "end to end"}
STATISTICS: Final = ("mean", "p50", "p99")
_PLOTTED: Final = {
    "ttft_mean": "TTFT, mean",
    "ttft_p50": "TTFT, p50",
    "ttft_p99": "TTFT, p99",
    "tpot_mean": "TPOT, mean",
    "e2e_mean": "end to end, mean",
    "prefill_wait": "waiting in prefill steps",
    "prefill_imbalance": "imbalance of prefill ranks",
    "decode_imbalance": "imbalance of decode ranks",
}
_ABREAST: Final = 4


class Result(Protocol):
    """A run, real or simulated."""

    @property
    def contender(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def numbers(self) -> dict[str, float]:
        """Return its numbers by their names."""
        ...


def changes(runs: Sequence[Result], key: str, baseline: str = ENGINES_OWN) -> dict[str, Change]:
    """Compare a number of every contender with the baseline, seed by seed; contenders without it are left out."""
    values = {(run.contender, run.seed): run.numbers().get(key) for run in runs}
    seeds = sorted({run.seed for run in runs})
    found = {}
    for name in dict.fromkeys(run.contender for run in runs):
        pairs = [(values.get((name, seed)), values.get((baseline, seed))) for seed in seeds]
        known = [(own, base) for own, base in pairs if own is not None and base]
        if known and len(known) == len(pairs):
            found[name] = change(*map(list, zip(*known, strict=True)))
    return found


def means(runs: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return the mean over the seeds of every number of every contender."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        own = [run.numbers() for run in runs if run.contender == name]
        keys = set.intersection(*(set(numbers) for numbers in own))
        found[name] = {key: statistics.fmean(numbers[key] for numbers in own) for key in own[0] if key in keys}
    return found


def print_report(console: Console, title: str, runs: Sequence[Result], simulated: Sequence[Result]) -> None:
    """Print times with their change against the baseline, the engines' totals, and the results of the simulation."""
    _print_times(console, title, runs)
    console.print(_engines_table(title, runs))
    _print_times(console, f"simulated: {title}", simulated)


def _print_times(console: Console, title: str, runs: Sequence[Result]) -> None:
    found = means(runs)
    for measure, label in MEASURES.items():
        if not any(f"{measure}_mean" in numbers for numbers in found.values()):
            continue
        table = Table(title=f"{title}: {label}, ms", title_justify="left")
        table.add_column("")
        for statistic in STATISTICS:
            table.add_column(statistic, justify="right")
            table.add_column("change", justify="right")
        table.add_column(f"mean against\n{DEFAULT}", justify="right")
        ours = changes(runs, f"{measure}_mean", DEFAULT)
        against = {statistic: changes(runs, f"{measure}_{statistic}") for statistic in STATISTICS}
        for name, numbers in found.items():
            cells = []
            for statistic in STATISTICS:
                value = numbers.get(f"{measure}_{statistic}")
                change_of_it = None if name == ENGINES_OWN else against[statistic].get(name)
                cells += ["" if value is None else f"{value:,.1f}", _percent(change_of_it)]
            table.add_row(name, *cells, _percent(None if name == DEFAULT else ours.get(name)))
        console.print(table)


def write_json(
    path: Path, about: dict[str, Any], runs: Sequence[Run | RecordedRun], simulated: Sequence[Result]
) -> None:
    """Write everything to a JSON file."""
    content = {
        "about": about,
        "summary": _summary(runs),
        "simulated": _summary(simulated),
        "runs": [run.as_json() for run in runs],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _summary(runs: Sequence[Result]) -> dict[str, Any]:
    return {
        name: {
            **numbers,
            **{
                f"{key}_{suffix}": {"mean": against.mean, "margin": against.margin}
                for key in (f"{measure}_{statistic}" for measure in MEASURES for statistic in STATISTICS)
                for suffix, baseline in (("change", ENGINES_OWN), ("against_default", DEFAULT))
                if (against := changes(runs, key, baseline).get(name)) is not None
            },
        }
        for name, numbers in means(runs).items()
    }


def plot(stem: Path, title: str, runs: Sequence[Result]) -> None:
    """Write ``STEM.png`` and ``STEM.svg``: how each contender's numbers differ from the baseline's."""
    found = [(label, each) for key, label in _PLOTTED.items() if len(each := changes(runs, key)) > 1]
    names = [name for name in dict.fromkeys(run.contender for run in runs) if name != ENGINES_OWN]
    rows = math.ceil(len(found) / _ABREAST)
    figure, axes = plt.subplots(
        rows,
        _ABREAST,
        sharey=True,
        squeeze=False,
        figsize=(2.8 * _ABREAST + 1.5, (0.3 * len(names) + 1.2) * rows),
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (label, against) in zip(axes.flat, found, strict=False):
        shown = [(position, against[name]) for position, name in enumerate(names) if name in against]
        colours = ["#2a7f62" if names[position].startswith(("dp-", "ours")) else "#b5651d" for position, _ in shown]
        axis.barh(
            [position for position, _ in shown],
            [each.mean * 100 for _, each in shown],
            xerr=[(each.margin or 0.0) * 100 for _, each in shown],
            color=colours,
            error_kw={"linewidth": 0.8},
        )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel(f"% against {ENGINES_OWN}", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(stem.with_suffix(f".{suffix}"), dpi=110)
    plt.close(figure)


def plot_again(path: Path) -> None:
    """Draw the plots of a JSON file again."""
    about, runs = read_runs(path)
    plot(path.with_suffix(""), about["title"], runs)


def _engines_table(title: str, runs: Sequence[Result]) -> Table:
    table = Table(
        title=f"{title}: totals of the engines",
        caption="waiting: share of the time in steps that the average rank waits for the fullest one. imbalance: "
        "tokens of the busiest rank of an engine against the average. machine: share of its processors that was busy, "
        "and the part of it that was ours",
        title_justify="left",
    )
    columns = {
        "failed": "failed",
        "prefill_wait": "prefill waiting",
        "decode_wait": "decode waiting",
        "prefill_imbalance": "prefill imbalance",
        "decode_imbalance": "decode imbalance",
        "cached": "cached",
        "machine": "machine",
        "ours": "ours",
    }
    table.add_column("")
    for label in columns.values():
        table.add_column(label, justify="right")
    for name, numbers in means(runs).items():
        table.add_row(name, *(_number(key, numbers[key]) for key in columns))
    return table


def _number(key: str, value: float) -> str:
    if key == "failed":
        return f"{value:.1f}" if value else "0"
    return f"{value:.2f}" if key.endswith("imbalance") else f"{value:.0%}"


def _percent(against: Change | None) -> str:
    if against is None:
        return ""
    margin = "" if against.margin is None else f" ± {against.margin * 100:.1f}"
    return f"{against.mean * 100:+.1f}{margin} %"
