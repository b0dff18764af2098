"""Put the numbers of docs/scheduling/*.json into the tables of docs/scheduling.md, and draw its plots."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT: Final = Path(__file__).resolve().parents[1] / "docs"
NUMBERS: Final = ROOT / "scheduling"
PAGE: Final = ROOT / "scheduling.md"
OWN: Final = "engines' own"
BOUND: Final = "clairvoyant"
OURS: Final = "dp-extproc"
DEFAULT: Final = "lockstep/minimum_tokens"
EVEN: Final = "least_tokens/minimum_tokens"
"""The policy that spreads sequences of every length equally over the decode engines."""
SCRAPED: Final = "random/minimum_tokens/scraped"
NO_RANK: Final = "lockstep/none"

ROBUST: Final = {
    "as-it-is": "everything as it should be",
    "sigma-0.6": "prompt lengths wrong by a factor of e^0.6 (sigma)",
    "sigma-1.0": "by a factor of e (sigma)",
    "bias-4": "all four times too long, until that is learned (down to twice)",
    "bias-quarter": "all four times too short, until that is learned",
    "underrated": "30 % of the prompts four times too short",
    "scrape-0.1s": "engines read every 100 ms",
    "scrape-10s": "every 10 s",
    "no-scrapes": "engines never report their load",
    "stale": "every sample is stale before the next one",
    "mute": "engines cannot be read for 30 % of the time, 20 s at a time, and are stale then",
    "lying": "engines report nonsense",
    "no-answers": "no event but the end of a request",
    "slow-prefill": "one prefill engine at half its speed (24 requests/s)",
    "slow-decode": "one decode engine at 0.6 of its speed",
    "direct": "30 % of the traffic bypasses the router",
    "aborts": "30 % of the clients disconnect after a wait (0.5 s on average)",
}

Results = dict[str, dict[str, float]]


def read(name: str) -> dict[str, Results] | None:
    """Read the numbers of one command, by setting and placement; None if it has not run."""
    path = NUMBERS / f"{name}.json"
    found: dict[str, Results] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def only(name: str) -> Results | None:
    """Read the numbers of a command with one setting."""
    found = read(name)
    return next(iter(found.values())) if found else None


def gain(numbers: dict[str, float], measure: str = "ttft") -> str:
    """Format by how much a time is below the engines' own."""
    value = numbers.get(f"{measure}_gain")
    return "" if value is None else f"{value:.1f}"


def lower_p99(numbers: dict[str, float], own: dict[str, float]) -> str:
    """Format by how much the slowest requests are below the engines' own."""
    return f"{100 * (1 - numbers['ttft_p99'] / own['ttft_p99']):.1f}" if numbers else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a Markdown table."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def policies() -> str | None:
    """Tabulate the gain of mean TTFT for every setting and policy."""
    found = read("policies")
    if found is None:
        return None
    names = [name for name in next(iter(found.values())) if name != OWN]
    rows = []
    for setting, results in found.items():
        bound = results[BOUND]["ttft_gain"]
        share = f"{results[DEFAULT]['ttft_gain'] / bound:.0%}"
        cells = [f"**{gain(results[name])}**" if name == DEFAULT else gain(results[name]) for name in names]
        rows.append([setting, f"{results[OWN]['ttft_mean']:,.0f}", *cells, share])
    return table(["setting", "engines' own, ms", *map(_short, names), "share"], rows)


def _short(name: str) -> str:
    """Name a placement in the head of a column, without the most frequent rank policy."""
    return name if "/" not in name else f"`{name.replace('/minimum_tokens', '')}`"


def tails() -> str | None:
    """Tabulate p99 TTFT and mean TPOT of the default for every setting."""
    found = read("policies")
    if found is None:
        return None
    rows = []
    for setting, results in found.items():
        own, ours, bound = results[OWN], results[DEFAULT], results[BOUND]
        p99 = [f"{100 * (1 - each['ttft_p99'] / own['ttft_p99']):.0f} %" for each in (ours, bound)]
        tpot = [f"{own['tpot_mean']:.1f}", gain(ours, "tpot"), gain(bound, "tpot")] if "tpot_mean" in own else [""] * 3
        rows.append([setting, f"{own['ttft_p99']:,.0f}", *p99, *tpot, f"{own['wait']:.0%}", f"{ours['wait']:.0%}"])
    return table(
        ["setting", "p99 TTFT, ms", "default", "clairvoyant", "TPOT, ms", "default, %", "clairvoyant, %",
         "waiting, engines' own", "waiting, default"],
        rows,
    )  # fmt: skip


def lengths() -> str | None:
    """Tabulate by how much TPOT is below the engines' own for every setting, for short and long requests apart."""
    found = read("policies")
    if found is None:
        return None
    names = (DEFAULT, EVEN, BOUND)
    kinds = ("tpot", "tpot_short", "tpot_long", "tpot_longest")
    rows = [
        [
            setting,
            f"{results[OWN]['tpot_mean']:.1f}",
            f"{results[OWN]['tpot_longest_mean']:.1f}",
            *(gain(results[name], kind) for name in names for kind in kinds),
        ]
        for setting, results in found.items()
        if "tpot_mean" in results[OWN]
    ]
    heads = ("all", "short", "long", "longest")
    return table(
        [
            "setting",
            "engines' own, ms",
            "longest",
            *(f"{_short(name)}: {kind}" if kind == "all" else kind for name in names for kind in heads),
        ],
        rows,
    )


def slowest() -> str | None:
    """Tabulate p99 TTFT as a multiple of the default's for every setting and policy."""
    found = read("policies")
    if found is None:
        return None
    names = [name for name in next(iter(found.values())) if name not in {BOUND, DEFAULT}]
    rows = []
    for setting, results in found.items():
        least = results[DEFAULT]["ttft_p99"]
        rows.append([setting, f"{least:,.0f}", *(f"{results[name]['ttft_p99'] / least:.2f}" for name in names)])
    return table(["setting", "default, ms", *map(_short, names)], rows)


def affinity() -> str | None:
    """Tabulate conversations, with and without prefix affinity."""
    results = only("affinity")
    if results is None:
        return None
    rows = [
        [
            f"`{name}`" if "/" in name else name,
            f"{numbers['ttft_mean']:,.0f}",
            f"{numbers['ttft_p99']:,.0f}",
            gain(numbers),
        ]
        for name, numbers in results.items()
    ]
    return table(["placement", "mean TTFT, ms", "p99", "gain, %"], rows)


def replicas() -> str | None:
    """Tabulate several replicas, with and without sync."""
    rows = []
    for count in (1, 2, 4, 8):
        cells = []
        for late in ("20", "50", "200", "blind"):
            results = only(f"replicas-{count}-{late if count > 1 else 'blind'}")
            cells.append(gain(results[DEFAULT]) if results else "")
        rows.append([str(count), *cells])
    if not any(any(row[1:]) for row in rows):
        return None
    return table(["replicas", "sync within 20 ms", "50 ms", "200 ms", "blind"], rows)


def robustness() -> str | None:
    """Tabulate disturbances and their cost."""
    rows = []
    for name, text in ROBUST.items():
        if (results := only(f"robust-{name}")) is not None:
            own, ours, none = results[OWN], results[DEFAULT], results.get(NO_RANK, {})
            rows.append(
                [
                    text,
                    f"{own['ttft_mean']:,.0f}",
                    *(gain(ours), lower_p99(ours, own), gain(ours, "tpot")),
                    *(gain(none), lower_p99(none, own), gain(none, "tpot")),
                    gain(results[SCRAPED]),
                    gain(results[BOUND]),
                ]
            )
    if not rows:
        return None
    return table(
        [
            "",
            "engines' own, ms",
            "default: TTFT, %",
            "p99, %",
            "TPOT, %",
            "`dp_rank: none`: TTFT, %",
            "p99, %",
            "TPOT, %",
            "`signal: scraped`: TTFT, %",
            "clairvoyant: TTFT, %",
        ],
        rows,
    )


def measured() -> str | None:
    """Tabulate every measured fleet and trace: dp-extproc, and the best of smg in each column."""
    rows = []
    for path in sorted(NUMBERS.glob("balance-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        summary, bound = found["summary"], found.get("simulated", {}).get(BOUND, {})
        others = [numbers for name, numbers in summary.items() if _is_smg(name)]
        if not others:
            continue
        cells = [found["about"]["title"], _size(found), f"{summary[OWN]['ttft_mean']:,.0f}"]
        for key in ("ttft_mean", "ttft_p99", "tpot_mean"):
            change = f"{key}_change"
            best: dict[str, Any] = min(
                (each for each in others if change in each), key=lambda each: each[change]["mean"], default={}
            )
            cells += [_change(summary[OURS].get(change)), _change(best.get(change))]
            if key != "ttft_p99":
                cells.append(_change(bound.get(change)))
        rows.append(cells)
    if not rows:
        return None
    return table(
        ["fleet, traffic", "runs", "engines' own, ms", "mean TTFT, %", "smg's best", "clairvoyant",
         "p99 TTFT, %", "smg's best", "mean TPOT, %", "smg's best", "clairvoyant"],
        rows,
    )  # fmt: skip


def agreement() -> str | None:
    """Tabulate the simulation of the measured traces."""
    rows = []
    for path in sorted(NUMBERS.glob("balance-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        summary, simulated = found["summary"], found.get("simulated", {})
        if not {OWN, OURS} <= summary.keys() & simulated.keys() or not any(map(_is_smg, summary)):
            continue
        cells = [found["about"]["title"], _size(found)]
        for name in (OWN, OURS):
            cells += [f"{each[name]['ttft_mean']:,.0f}" for each in (summary, simulated)]
        cells += [_change(each[OURS].get("ttft_mean_change")) for each in (summary, simulated)]
        cells += [_change(each[OURS].get("tpot_mean_change")) for each in (summary, simulated)]
        rows.append(cells)
    if not rows:
        return None
    return table(
        ["fleet, traffic", "runs", "engines' own, ms", "simulated", "dp-extproc, ms", "simulated", "mean TTFT, %",
         "simulated", "mean TPOT, %", "simulated"],
        rows,
    )  # fmt: skip


def _size(found: dict[str, Any]) -> str:
    return f"{_seeds(found)} of {found['about']['options']['requests']}"


def _seeds(found: dict[str, Any]) -> int:
    return len({run["seed"] for run in found["runs"]})


def _is_smg(name: str) -> bool:
    return name.startswith("smg")


def _change(change: dict[str, float] | None) -> str:
    """Format a change with half the width of its interval."""
    if change is None:
        return ""
    margin = "" if change["margin"] is None else f" ± {100 * change['margin']:.1f}"
    return f"{100 * change['mean']:+.1f}{margin}"


def balance() -> str | None:
    """Tabulate real routers in front of strict engines, with a table for each run of bench/balance."""
    parts = []
    for path in sorted(NUMBERS.glob("balance-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        about, rows = found["about"], []
        for name, numbers in found["summary"].items():
            changes = [numbers.get(f"{key}_change") for key in ("ttft_mean", "ttft_p99", "tpot_mean")]
            rows.append(
                [
                    f"**{name}**" if name == OURS else name,
                    f"{numbers['ttft_mean']:,.0f}",
                    *("" if each is None or name == OWN else f"{100 * each['mean']:+.0f}" for each in changes),
                    f"{numbers['prefill_wait']:.0%}",
                    f"{numbers['failed']:.0f}",
                ]
            )
        header = ["", "mean TTFT, ms", "change, %", "p99 TTFT, %", "TPOT, %", "waiting", "failed"]
        parts.append(
            f"{about['title']}, {_seeds(found)} seeds of {about['options']['requests']} requests "
            f"([plots](scheduling/{path.stem}.png); {_machine(found['runs'])}):\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts) or None


def _machine(runs: Sequence[dict[str, Any]]) -> str:
    """Format how busy the runs kept the processors, and how busy other programs did meanwhile."""
    ours = [run["ours"] for run in runs]
    others = max(0.0, *(run["machine"] - run["ours"] for run in runs))
    return f"runs took {min(ours):.0%} to {max(ours):.0%} of the machine, others up to {others:.0%}"


def draw_policies() -> None:
    """Draw the gain of each policy in each setting."""
    found = read("policies")
    if found is None:
        return
    shown = [BOUND, DEFAULT, "least_tokens/minimum_tokens", "random/minimum_tokens", SCRAPED]
    figure, axes = plt.subplots(figsize=(10, 5.5))
    width = 0.8 / len(shown)
    for position, name in enumerate(shown):
        places = [index + position * width for index in range(len(found))]
        values = [results[name]["ttft_gain"] for results in found.values()]
        errors = [results[name]["ttft_gain_ci"] for results in found.values()]
        axes.bar(places, values, width, yerr=errors, label=name, error_kw={"linewidth": 0.7})
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(found))], list(found), rotation=35, ha="right")
    axes.set_ylabel("mean time to first token, % below the engines' own")
    axes.set_ylim(bottom=max(-60, axes.get_ylim()[0]))
    axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, "policies")


def draw_replicas() -> None:
    """Draw the loss of replicas without sync."""
    counts = (1, 2, 4, 8)
    figure, axes = plt.subplots(figsize=(6, 3.8))
    for late, label in (("20", "sync within 20 ms"), ("50", "50 ms"), ("200", "200 ms"), ("blind", "blind")):
        found = [only(f"replicas-{count}-{late if count > 1 else 'blind'}") for count in counts]
        if all(found):
            axes.plot(counts, [results[DEFAULT]["ttft_gain"] for results in found if results], marker="o", label=label)
    axes.set_xticks(counts)
    axes.set_xlabel("replicas of the service")
    axes.set_ylabel("mean TTFT, % below the engines' own")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    _save(figure, "replicas")


def _save(figure: Any, name: str) -> None:
    figure.savefig(NUMBERS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


TABLES: Final[dict[str, Callable[[], str | None]]] = {
    "policies": policies,
    "tails": tails,
    "lengths": lengths,
    "slowest": slowest,
    "affinity": affinity,
    "replicas": replicas,
    "robustness": robustness,
    "balance": balance,
    "measured": measured,
    "agreement": agreement,
}


def main() -> None:
    """Rewrite the text between the marks of each table."""
    mpl.rcParams["svg.hashsalt"] = "dp-extproc"  # the same numbers make the same file
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        content = make()
        if content is not None:
            marks = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            page, count = marks.subn(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", page)  # type: ignore[misc]
            if not count:
                raise SystemExit(f"{PAGE} has no place for the table {name}")
    PAGE.write_text(page, encoding="utf-8")
    draw_policies()
    draw_replicas()


if __name__ == "__main__":
    main()
