"""Run ``dp-extproc simulate``: compute what the policies would gain on a given fleet and traffic."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import AffinitySettings, HostPolicy, PolicySettings, RankPolicy
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.settings import SETTINGS, Setting
from dp_extproc.lab.simulate.study import CLAIRVOYANT, ENGINES_OWN, Contender, Study, run_study, share_of_gain
from dp_extproc.lab.workload.generate import NAMES
from dp_extproc.lab.workload.trace import TraceError, TraceRequest, read_trace

_DEFAULT: Final = "lockstep/minimum_tokens"
_AROUND: Final = (
    ("replicas", int, "of the router"),
    ("scrape_interval", float, "seconds between two readings of an engine"),
    ("stale_after", float, "age in seconds from which a reading is stale (default: never)"),
    ("mute", float, "share of the time in which an engine cannot be read, 20 seconds each time"),
    ("error_sigma", float, "error of prompt lengths as estimated: sigma of its logarithm"),
    ("bias", float, "factor of all estimates, until the router has learned better from the engines' counts"),
    ("underrated", float, "share of the requests that are taken for a quarter of their length"),
    ("direct_share", float, "share of the requests that do not pass the router"),
    ("aborts", float, "share of the requests whose clients leave a queue in which they wait for long"),
)
_FLEET: Final = (
    ("prefill", int, "prefill engines; 0 for aggregated engines"),
    ("decode", int, "decode engines, or aggregated ones"),
    ("ranks", int, "DP ranks of each engine"),
    ("chunk", int, "prompt tokens per rank and step; 0 for no chunks"),
    ("capacity", int, "KV tokens of a rank"),
    ("slow_prefill", float, "how many times longer the steps of the first prefill engine take"),
    ("slow_decode", float, "how many times longer the steps of the first decode engine take"),
)
_TRAFFIC: Final = (
    ("rate", float, "requests per second"),
    ("requests", int, "of each run"),
    ("burst", float, "for 5 of every 20 seconds so many times the rate"),
    ("concurrency", int, "requests at a time, in place of a rate"),
)
_TPOT: Final = {"all": "tpot", "short": "tpot_short", "long": "tpot_long", "longest": "tpot_longest"}
"""The groups of requests whose time per output token is printed, with the names of their numbers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "--setting", action="append", choices=[*SETTINGS, "all"], metavar="NAME",
        help=f"a fleet with its traffic, to start from; one or several of {', '.join(SETTINGS)}, or all",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, help='JSON lines: {"arrival": s, "prompt_tokens": n, "output_tokens": n}')
    parser.add_argument("--lengths", choices=NAMES, help="kind of traffic")
    for name, kind, text in (*_FLEET, *_TRAFFIC, *_AROUND):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, help="whether engines have one")
    parser.add_argument(
        "--lockstep", action=argparse.BooleanOptionalAction, help="whether the ranks of an engine step together"
    )
    parser.add_argument(
        "--sync", type=float, metavar="MS", help="how late replicas get events of peers; default: never"
    )
    parser.add_argument("--no-answers", action="store_true", help="the router gets only the end of a request")
    parser.add_argument("--no-scrapes", action="store_true", help="engines do not report their load")
    parser.add_argument("--lying", action="store_true", help="engines report nonsense")
    parser.add_argument(
        "--policy", action="append", metavar="HOST/RANK[/scraped][/blind]", type=_contender,
        help=f"policies to compare (default: {_DEFAULT}); /scraped: load.signal, /blind: without affinity",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=10, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Simulate and print. Returns 0, or 2 when the trace cannot be read."""
    trace: tuple[TraceRequest, ...] | None = None
    if args.trace is not None:
        try:
            with args.trace.open(encoding="utf-8") as lines:
                trace = tuple(read_trace(lines))
        except (OSError, TraceError) as error:
            sys.stderr.write(f"{args.trace}: {error}\n")
            return 2
    console = Console() if sys.stdout.isatty() else Console(width=120)
    contenders = [Contender(ENGINES_OWN), Contender(CLAIRVOYANT), *(args.policy or [_contender(_DEFAULT)])]
    found = {}
    for name, setting in _settings(args).items():
        found[name] = run_study(Study(setting, contenders, args.seeds, trace))
        console.print(_table(name, found[name]))
        if "tpot_mean" in found[name][ENGINES_OWN]:
            console.print(_tpot_table(found[name]))
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _contender(text: str) -> Contender:
    host, _, rest = text.partition("/")
    rank, *options = rest.split("/")
    try:
        policy = PolicySettings(
            host=HostPolicy(host),
            dp_rank=RankPolicy(rank or RankPolicy.MINIMUM_TOKENS),
            affinity=AffinitySettings(prefixes="blind" not in options),
        )
    except ValueError:
        host_policies, rank_policies = ", ".join(HostPolicy), ", ".join(RankPolicy)
        raise argparse.ArgumentTypeError(f"{text!r}: write HOST/RANK, of {host_policies} and {rank_policies}") from None
    if unknown := set(options) - {"scraped", "blind"}:
        raise argparse.ArgumentTypeError(f"{text!r}: {', '.join(unknown)} is not known; scraped and blind are")
    signal = LoadSignal.SCRAPED if "scraped" in options else LoadSignal.ESTIMATE
    return Contender(text, policy, signal)


def _settings(args: argparse.Namespace) -> dict[str, Setting]:
    """Return the settings that are asked for, with the changes of the other options."""
    names = args.setting or []
    chosen = dict(SETTINGS) if "all" in names else {name: SETTINGS[name] for name in names}
    if not chosen:
        chosen = {"your own": Setting(Fleet(), args.lengths or "agent", 20.0)}
    return {name: _changed(setting, args) for name, setting in chosen.items()}


def _changed(setting: Setting, args: argparse.Namespace) -> Setting:
    def given(names: tuple[tuple[str, type, str], ...]) -> dict[str, int | float]:
        return {name: value for name, _, _ in names if (value := getattr(args, name)) is not None}

    fleet: Fleet = replace(setting.fleet, **given(_FLEET))  # type: ignore[arg-type]
    if args.lockstep is not None:
        fleet = replace(fleet, lockstep=args.lockstep)
    if args.prefix_cache is not None:
        fleet = replace(fleet, prefix_cache=args.prefix_cache)
    around: Surroundings = replace(
        setting.around,
        sync=None if args.sync is None else args.sync / 1000,
        answers=not args.no_answers,
        scrapes=not args.no_scrapes,
        lying=args.lying,
        **given(_AROUND),  # type: ignore[arg-type]
    )
    changed: Setting = replace(
        setting,
        fleet=fleet,
        around=around,
        lengths=args.lengths or setting.lengths,
        **given(_TRAFFIC),  # type: ignore[arg-type]
    )
    return changed


def _table(name: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """Make the table of one setting; times in milliseconds, gains against the engines' own placement."""
    table = Table(title=name, title_justify="left")
    for column in ("placement", "TTFT mean", "p50", "p99", "gain", "of the clairvoyant's", "waiting"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for contender, numbers in results.items():
        share = share_of_gain(results, contender)
        builtin = contender in {ENGINES_OWN, CLAIRVOYANT}
        table.add_row(
            contender,
            *(f"{numbers[f'ttft_{kind}']:,.0f}" for kind in ("mean", "p50", "p99")),
            "" if contender == ENGINES_OWN else f"{numbers['ttft_gain']:.1f} ± {numbers['ttft_gain_ci']:.1f} %",
            "" if builtin or share is None else f"{share:.0%}",
            f"{numbers['wait']:.0%}",
        )
    return table


def _tpot_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Make the table of the time per output token, for short and long requests apart."""
    table = Table(
        title="time per output token, ms",
        caption="by tokens of prompt and answer: the short half of the requests, the long half, the longest tenth",
        title_justify="left",
    )
    for column in ("placement", *(each for kind in _TPOT for each in (kind, "gain")), "p99"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for contender, numbers in results.items():
        cells = []
        for key in _TPOT.values():
            time, gain = numbers.get(f"{key}_mean"), numbers.get(f"{key}_gain")
            cells.append("" if time is None else f"{time:.2f}")
            cells.append("" if contender == ENGINES_OWN or gain is None else f"{gain:.1f} %")
        table.add_row(contender, *cells, f"{numbers['tpot_p99']:.2f}")
    return table
