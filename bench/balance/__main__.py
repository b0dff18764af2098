"""Measure scheduling end to end: the same requests through dp-extproc and other routers, on this machine.

Engines are the strict stand-ins, which take their steps together and count the cost; everything else is real. Each run
has fresh engines and a fresh router. Runs of one seed follow each other, so other load of the machine affects all
equally.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.balance.bound import SimulatedRun, simulate
from bench.balance.client import Load
from bench.balance.contenders import MAIN, Contender, chosen
from bench.balance.engines import COSTS, RELEASE, STREAM_INTERVAL, Size
from bench.balance.machine import time_scale_for
from bench.balance.recorded import RecordedRun, read_to_continue
from bench.balance.report import plot, plot_again, print_report, write_json
from bench.balance.runs import Run, run_once
from dp_extproc.lab.workload.capacity import Topology, requests_per_second
from dp_extproc.lab.workload.generate import NAMES, make_trace
from dp_extproc.lab.workload.trace import TraceRequest, read_trace

_SAMPLE: Final = 5000
"""Requests for the mean lengths of a trace."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs to make."""

    contenders: Sequence[Contender]
    traces: Mapping[int, Sequence[TraceRequest]]
    """Traces by seed."""
    size: Size
    load: Load
    rate: float
    """Requests per second of an unscaled engine."""
    capacity: float
    """Requests per second that the fleet can serve at most."""
    title: str


def main() -> int:
    """Run the benchmark.

    Returns:
        Its exit status.
    """
    args = _arguments()
    for path in args.plot or ():
        plot_again(path)
    if args.plot:
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        plan = _plan(args)
        names = [contender.name for contender in plan.contenders]
        earlier = (
            read_to_continue(args.out.with_suffix(".json"), _options(args), names, plan.traces) if args.add else []
        )
    except (ValueError, OSError) as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    requests = len(next(iter(plan.traces.values())))
    slower = f"engines {plan.size.time_scale:g} times slower" if plan.size.time_scale > 1 else "engines at full speed"
    console.print(f"{plan.title}; {requests} requests, {len(plan.traces)} seeds; {slower}")
    runs: list[Run | RecordedRun] = list(earlier)
    simulated: list[SimulatedRun] = []
    done = {run.seed for run in earlier}
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed, trace in plan.traces.items():
        simulated += simulate(seed, trace, plan.size, plan.load)
        if seed in done:
            continue
        for contender in plan.contenders:
            with Progress(*columns, console=console) as progress:
                task = progress.add_task(f"seed {seed}: {contender.name}", total=len(trace))
                advance = partial(progress.advance, task)
                run = run_once(contender, seed, trace, size=plan.size, load=plan.load, on_done=advance)
            runs.append(run)
            for failure in run.failed[:1]:
                console.print(f"{len(run.failed)} failed, such as: {failure.reason}", markup=False)
        if args.out is not None:  # seed by seed, so that a stop loses no finished seed
            write_json(args.out.with_suffix(".json"), _about(args, plan), runs, simulated)
    print_report(console, plan.title, runs, simulated)
    if args.out is not None:
        plot(args.out, plan.title, runs)
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    """Plan the runs.

    Raises:
        ValueError: An option has an impossible value.
        OSError: The trace is unreadable.
    """
    topology, contenders = Topology.parse(args.topology), chosen(args.only or MAIN)
    size = Size(topology, chunk=args.chunk)
    sample = make_trace(args.trace, _SAMPLE, 1.0, seed=0) if args.trace in NAMES else _read(args.trace)
    capacity = requests_per_second(topology, COSTS, size.limits, size.limits, sample)
    seeds = range(1, args.seeds + 1)
    if args.trace in NAMES:
        rate = args.rate or capacity * args.load
        traces = {seed: make_trace(args.trace, args.requests, rate, seed, burst=args.burst) for seed in seeds}
    else:  # a file has the arrival times of its requests
        rate = len(sample) / max(sample[-1].arrival, 1e-9)
        traces = dict.fromkeys(seeds, sample[: args.requests])
    tokens = rate * sum(request.output_tokens for request in sample) / len(sample)
    size = replace(size, time_scale=args.time_scale or time_scale_for(rate, tokens))
    how = f"{args.concurrency} at a time" if args.concurrency else f"{rate:.2f} requests/s ({rate / capacity:.0%})"
    how += f", {args.burst:g} times as many in bursts" if args.burst > 1 else ""
    title = f"{topology}, {Path(args.trace).stem}, {how}"
    return Plan(contenders, traces, size, Load(size.time_scale, args.concurrency), rate, capacity, title)


def _read(path: str) -> list[TraceRequest]:
    with Path(path).open(encoding="utf-8") as lines:
        return read_trace(lines)


def _about(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    return {
        "title": plan.title,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": _options(args),
        "rate": plan.rate,
        "capacity": plan.capacity,
        "size": asdict(plan.size),
        "costs": asdict(COSTS),
        "engine": RELEASE,
        "stream_interval": STREAM_INTERVAL,
    }


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that all runs of a file share; each run has its contender and seed itself."""
    return {key: value for key, value in vars(args).items() if key not in {"seeds", "only", "plot", "out", "add"}}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.balance", description=__doc__)
    add = parser.add_argument
    add("--trace", default="seed-prompts", help=f"{', '.join(NAMES)}, or a JSONL file (default: %(default)s)")
    add("--topology", default="1p1d2", metavar="PpDdN", help="engines and ranks of each (default: %(default)s)")
    add("--load", type=float, default=0.8, help="share of what the fleet can do at most (default: %(default)s)")
    add("--rate", type=float, help="requests per second instead")
    add("--burst", type=float, default=1.0, help="for 5 of every 20 seconds so many times the rate")
    add("--concurrency", type=int, help="so many requests at a time, without regard to arrivals")
    add("--requests", type=int, default=300, help="per run (default: %(default)s)")
    add("--seeds", type=int, default=3, help="traces (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help=f"contenders, as patterns (default: {', '.join(MAIN)}; '*' for all)")
    add("--chunk", type=int, default=4096, help="prompt tokens per rank and step (default: %(default)s)")
    add("--time-scale", type=float, help="how slow engines are (default: so that this machine keeps up)")
    add("--plot", type=Path, nargs="+", metavar="FILE", help="only make the plots of such JSON files anew")
    add("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.png and STEM.svg")
    add("--add", action="store_true", help="keep the seeds that STEM.json has, and measure those that it lacks")
    args = parser.parse_args()
    if args.add and args.out is None:
        parser.error("--add needs --out")
    return args


if __name__ == "__main__":
    sys.exit(main())
