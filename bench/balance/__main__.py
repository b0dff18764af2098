"""Placement end to end: the same requests through our Envoy and service and through others, on this machine.

Engines are the strict stand-ins, which take their steps together and count what those cost; everything else is real.
Each run has fresh engines and a fresh router. Runs of one seed follow each other, so that what the machine does
besides hits all alike.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.balance.bound import SimulatedRun, simulate
from bench.balance.client import Load
from bench.balance.contenders import MAIN, chosen
from bench.balance.engines import COSTS, RELEASE, STREAM_INTERVAL, Size
from bench.balance.machine import time_scale_for
from bench.balance.report import plot, print_report, write_json
from bench.balance.runs import Run, run_once
from dp_extproc.workload.capacity import Topology, requests_per_second
from dp_extproc.workload.generate import NAMES, make_trace
from dp_extproc.workload.trace import TraceRequest, read_trace


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent."""

    trace: str
    """One of the made ones, or a file."""
    requests: int
    rate: float
    """Per second of an unscaled engine."""
    burst: float

    def make(self, seed: int) -> list[TraceRequest]:
        """Make the requests of a seed; a file has the same for each."""
        if self.trace in NAMES:
            return make_trace(self.trace, self.requests, self.rate, seed, burst=self.burst)
        with Path(self.trace).open(encoding="utf-8") as lines:
            return read_trace(lines)[: self.requests]


def main() -> int:
    """Run the benchmark.

    Returns:
        Its exit status.
    """
    args = _arguments()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        topology, contenders = Topology.parse(args.topology), chosen(args.only or MAIN)
        size = Size(topology, chunk=args.chunk)
        traffic = Traffic(args.trace, args.requests, args.rate or 1.0, args.burst)
        sample = traffic.make(0)
    except (ValueError, OSError) as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    capacity = requests_per_second(topology, COSTS, size.limits, size.limits, make_sample(traffic, sample))
    rate = args.rate or capacity * args.load
    traffic = Traffic(args.trace, args.requests, rate, args.burst)
    tokens = rate * sum(request.output_tokens for request in sample) / len(sample)
    size = Size(topology, chunk=args.chunk, time_scale=args.time_scale or time_scale_for(rate, tokens))
    load = Load(size.time_scale, args.concurrency)
    how = f"{args.concurrency} at a time" if args.concurrency else f"{rate:.2f} requests/s ({rate / capacity:.0%})"
    title = f"{topology}, {args.trace}, {how}"
    console.print(f"{title}; {args.requests} requests, {args.seeds} seeds; engines {size.time_scale:g} times slower")
    runs: list[Run] = []
    simulated: list[SimulatedRun] = []
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed in range(1, args.seeds + 1):
        trace = traffic.make(seed)
        for contender in contenders:
            with Progress(*columns, console=console) as progress:
                task = progress.add_task(f"seed {seed}: {contender.name}", total=len(trace))
                advance = partial(progress.advance, task)
                runs.append(run_once(contender, seed, trace, size=size, load=load, on_done=advance))
            for failure in runs[-1].failed[:1]:
                console.print(f"{len(runs[-1].failed)} failed, such as: {failure.reason}", markup=False)
        simulated += simulate(seed, trace, size, load)
    print_report(console, title, runs, simulated)
    if args.out is not None:
        about: dict[str, Any] = {
            "title": title,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": {key: value for key, value in vars(args).items() if key != "out"},
            "rate": rate,
            "capacity": capacity,
            "size": asdict(size),
            "costs": asdict(COSTS),
            "engine": RELEASE,
            "stream_interval": STREAM_INTERVAL,
        }
        write_json(args.out.with_suffix(".json"), about, runs, simulated)
        plot(args.out, title, runs)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.balance", description=__doc__)
    add = parser.add_argument
    add("--trace", default="seed-prompts", help=f"{', '.join(NAMES)}, or a JSONL file (default: %(default)s)")
    add("--topology", default="1p1d2", metavar="PpDdN", help="servers and ranks of each (default: %(default)s)")
    add("--load", type=float, default=0.8, help="share of what the fleet can do at most (default: %(default)s)")
    add("--rate", type=float, help="requests per second instead")
    add("--burst", type=float, default=1.0, help="for 5 of every 20 seconds so many times the rate")
    add("--concurrency", type=int, help="so many requests at a time, without regard to arrivals")
    add("--requests", type=int, default=300, help="per run (default: %(default)s)")
    add("--seeds", type=int, default=3, help="traces (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help=f"contenders, as patterns (default: {', '.join(MAIN)}; '*' for all)")
    add("--chunk", type=int, default=4096, help="prompt tokens per rank and step (default: %(default)s)")
    add("--time-scale", type=float, help="how slow engines are (default: so that this machine keeps up)")
    add("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.png and STEM.svg")
    return parser.parse_args()


def make_sample(traffic: Traffic, requests: list[TraceRequest]) -> list[TraceRequest]:
    """Give enough requests for the mean lengths of this traffic."""
    return make_trace(traffic.trace, 5000, 1.0, seed=0) if traffic.trace in NAMES else requests


if __name__ == "__main__":
    sys.exit(main())
