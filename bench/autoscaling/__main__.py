"""Compare autoscaling signals on a load ramp.

The fleet is simulated, as in ``dp-extproc simulate``, and scheduled by the service's own code. The autoscaler is the
algorithm of Kubernetes' HPA with its default behavior. Each signal gets the same requests. The load rises eightfold
in half an hour, stays, and falls again. Prints the table of docs/autoscaling.md.
"""

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Final

from bench.autoscaling.fleet import ROLES, Propose, ScaledFleet, Scrape
from bench.autoscaling.hpa import SYNC_SECONDS, Autoscaler, Behavior, average_value, pods_average
from bench.autoscaling.steady import RATES as RATES_STEADY
from bench.autoscaling.steady import run_steady
from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.engines.model import Role
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.lab.workload.lengths import LENGTHS
from dp_extproc.lab.workload.trace import Segment, TraceRequest

MOST: Final = {Role.PREFILL: 8, Role.DECODE: 16}
"""Largest number of replicas of each role."""
LEAST: Final = {Role.PREFILL: 1, Role.DECODE: 2}
FLEET: Final = Fleet(prefill=MOST[Role.PREFILL], decode=MOST[Role.DECODE], ranks=2, capacity=60_000)
TRAFFIC: Final = "seed"
RATES: Final = ((0, 2.0), (300, 2.0), (2100, 16.0), (3000, 16.0), (3900, 2.0), (4800, 2.0))
"""Requests per second at some seconds, and linear between them."""
START_SECONDS: Final = 120.0
"""Seconds from the order of an engine until it is ready."""
TTFT_LIMIT: Final = 2.0
"""Seconds to the first token above which a request counts as late."""
QUEUE_TARGET: Final = 5.0
"""Waiting requests per engine, as published examples for vLLM have."""
BUSY_TARGET: Final = 0.8
"""Share of the time in steps, of GPUs."""
TARGET: Final = 0.7
"""Share of the capacity that the fixed size leaves taken at the peak."""


def rate_at(seconds: float) -> float:
    """Return the requests per second at a time."""
    for (start, low), (end, high) in pairwise(RATES):
        if seconds <= end:
            return low + (high - low) * (seconds - start) / (end - start)
    return 0.0


def make_ramp(seed: int) -> list[TraceRequest]:
    """Make the requests: a Poisson process of that rate."""
    rng, now = Random(f"ramp {seed}"), 0.0
    trace: list[TraceRequest] = []
    highest = max(rate for _, rate in RATES)
    while now < RATES[-1][0]:
        now += rng.expovariate(highest)
        if rng.random() * highest < rate_at(now):
            prompt, output = LENGTHS[TRAFFIC](rng)
            trace.append(TraceRequest(now, (Segment(len(trace), prompt),), output))
    return trace


def by_wanted(scrapes: Sequence[Scrape], replicas: int) -> int:
    """Scale by the wanted endpoints, rounded up as in deploy/autoscaling: External, AverageValue 1."""
    signal = scrapes[-1].signal if scrapes else None
    return replicas if signal is None else average_value(math.ceil(signal.wanted), 1.0, replicas)


def by_queue(scrapes: Sequence[Scrape], replicas: int) -> int:
    """Scale by the waiting requests of all engines: External, AverageValue 5."""
    return average_value(float(sum(scrapes[-1].queues)), QUEUE_TARGET, replicas) if scrapes else replicas


def by_busy(scrapes: Sequence[Scrape], replicas: int) -> int:
    """Scale by the utilization of the GPUs, a mean of the last minute: Pods, AverageValue 0.8."""
    ready = min((len(each.busy) for each in scrapes), default=0)
    values = [statistics.fmean(each.busy[index] for each in scrapes) for index in range(ready)]
    return pods_average(values, BUSY_TARGET, replicas) if values else replicas


def fixed(_scrapes: Sequence[Scrape], replicas: int) -> int:
    """Do not scale."""
    return replicas


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to scale."""

    name: str
    propose: Propose
    target: float = AutoscalingSettings().decode_target
    """Target of both roles, if the signals of the service are used."""


CONTENDERS: Final = (
    Contender("`dp_extproc_wanted_endpoints`, targets 0.7", by_wanted),
    Contender("`dp_extproc_wanted_endpoints`, targets 0.6", by_wanted, 0.6),
    Contender("waiting requests, 5 per engine", by_queue),
    Contender("GPU utilization, 80 %", by_busy),
    Contender("no autoscaling, sized for the peak", fixed),
)


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one contender on one trace. Times in seconds."""

    late: float
    """Share of the requests whose first token came late."""
    ttft_mean: float
    ttft_p99: float
    hours: Mapping[Role, float]
    """Hours of engines, from the order of each."""
    most: Mapping[Role, int]
    """Most replicas at a time."""
    changes: int
    """Changes of the number of replicas, of both roles."""


def run(contender: Contender, seed: int) -> Result:
    """Run one trace with one contender."""
    is_fixed = contender.propose is fixed
    least, most = (peak(), peak()) if is_fixed else (LEAST, MOST)
    settings = AutoscalingSettings(prefill_target=contender.target, decode_target=contender.target)
    simulation = Simulation(FLEET, Surroundings(), make_ramp(seed), seed)
    scalers = {role: Autoscaler(least[role], most[role], Behavior()) for role in ROLES}
    fleet = ScaledFleet(simulation, scalers, contender.propose, settings, START_SECONDS)
    ttft = sorted(each.first_token for each in simulation.run(fleet.router).outcomes)
    orders = [ordered for now, ordered in fleet.history if now <= RATES[-1][0]]
    return Result(
        late=sum(each > TTFT_LIMIT for each in ttft) / len(ttft),
        ttft_mean=statistics.fmean(ttft),
        ttft_p99=ttft[int(0.99 * len(ttft))],
        hours={role: sum(ordered[role] for ordered in orders) * SYNC_SECONDS / 3600 for role in ROLES},
        most={role: max(ordered[role] for ordered in orders) for role in ROLES},
        changes=sum(before[role] != after[role] for before, after in pairwise(orders) for role in ROLES),
    )


def peak() -> dict[Role, int]:
    """Return the engines that keep both roles at their target at the highest rate, by the cost model of the engines."""
    rng = Random("lengths")
    lengths = [LENGTHS[TRAFFIC](rng) for _ in range(20_000)]
    prompt, output = (statistics.fmean(each) for each in zip(*lengths, strict=True))
    squared = statistics.fmean(length * (2 * start + length) / 2 for start, length in lengths)
    costs, rate = FLEET.costs, max(each for _, each in RATES)
    step = costs.prefill_seconds([FLEET.chunk] * FLEET.ranks)
    prefill = rate * prompt / (FLEET.ranks * FLEET.chunk / step) / TARGET
    held = TARGET * FLEET.capacity
    sequences = held / (squared / output)
    seconds = costs.decode_seconds([round(sequences)], [round(held)])
    decode = rate * output * seconds / (sequences * FLEET.ranks)
    return {Role.PREFILL: math.ceil(prefill), Role.DECODE: math.ceil(decode)}


def _row(contender: Contender, results: Sequence[Result]) -> str:
    late, mean, p99 = (
        statistics.fmean(getattr(each, key) for each in results) for key in ("late", "ttft_mean", "ttft_p99")
    )
    hours, most = [], []
    for role in ROLES:
        hours.append(f"{statistics.fmean(each.hours[role] for each in results):.1f}")
        most.append(str(max(each.most[role] for each in results)))
    changes = statistics.fmean(each.changes for each in results)
    return (
        f"| {contender.name} | {100 * late:.1f} % | {mean:.2f} | {p99:.1f} "
        f"| {' + '.join(hours)} | {' + '.join(most)} | {changes:.0f} |"
    )


def print_steady() -> None:
    """Print the share of prefill, and the time to first token, at several rates."""
    with multiprocessing.get_context("fork").Pool() as pool:
        results = pool.map(run_steady, RATES_STEADY, chunksize=1)
    print("| requests/s | share of prefill | mean TTFT, s | p99, s |")
    print("| --: | --: | --: | --: |")
    for each in results:
        print(f"| {each.rate} | {each.share:.2f} | {each.ttft_mean:.2f} | {each.ttft_p99:.1f} |")


def main() -> None:
    """Run all contenders on all traces, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of traces (default: %(default)s)")
    parser.add_argument("--steady", action="store_true", help="print the share of prefill at steady rates instead")
    args = parser.parse_args()
    if args.steady:
        print_steady()
        return
    jobs = [(contender, seed) for contender in CONTENDERS for seed in range(args.seeds)]
    with multiprocessing.get_context("fork").Pool() as pool:
        results = pool.starmap(run, jobs, chunksize=1)
    print(
        f"| scaled by | TTFT above {TTFT_LIMIT:g} s | mean TTFT, s | p99, s | engine hours | most engines | changes |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for position, contender in enumerate(CONTENDERS):
        print(_row(contender, results[position * args.seeds : (position + 1) * args.seeds]))


if __name__ == "__main__":
    main()
