"""Compare fleets of two revision groups with the same engines without groups.

The fleets are simulated, as in ``dp-extproc simulate``, and scheduled by the service's own code without weights. Prints
the numbers of docs/scheduling.md, for several weights of the cost on decode: the share of the first group, and how much
longer whole requests and the time to first token are than without groups.
"""

import statistics
from collections.abc import Iterator
from typing import Final
from unittest.mock import patch

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.model import Role
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.routers import Ours
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.lab.workload.generate import make_trace

Groups = tuple[tuple[int, int], ...]
"""Prefill and decode engines of each group."""
WEIGHTS: Final = (0.0, 0.005, 0.02, 0.1, 1.0)
TRAFFIC: Final = (("agent", 28.0), ("azure", 100.0), ("sharegpt", 300.0))
"""Lengths, and requests per second."""
WHOLE: Final[Groups] = ((4, 4),)
SHAPES: Final[tuple[Groups, ...]] = (((3, 3), (1, 1)), ((3, 1), (1, 3)))
REQUESTS: Final = 2000
SEEDS: Final = range(3)


def run(groups: Groups, lengths: str, rate: float, seed: int) -> tuple[float, float, float]:
    """Return the share of the first group, and the mean times of whole requests and to the first token."""
    fleet = Fleet(prefill=4, decode=4, groups=groups)
    simulation = Simulation(fleet, Surroundings(), make_trace(lengths, REQUESTS, rate, seed), seed)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    summary = simulation.run(router).summary()
    first = [fleet.group_of(Role.PREFILL, each.prefill) == "v1" for each in router.placements]
    return statistics.fmean(first), summary["e2e_mean"], summary["ttft_mean"]


def cells(lengths: str, rate: float) -> Iterator[str]:
    """Yield the share, and both times in percent, of each shape."""
    wholes = [run(WHOLE, lengths, rate, seed) for seed in SEEDS]
    for shape in SHAPES:
        runs = [run(shape, lengths, rate, seed) for seed in SEEDS]
        yield f"{100 * statistics.fmean(share for share, _, _ in runs):.0f} %"
        for index in (1, 2):
            ratio = statistics.fmean(one[index] / whole[index] for one, whole in zip(runs, wholes, strict=True))
            yield f"{100 * (ratio - 1):+.0f} %"


def main() -> None:
    """Print a row for each traffic and weight."""
    shapes = (" and ".join(f"{prefill} + {decode}" for prefill, decode in shape) for shape in SHAPES)
    print("| traffic | weight |", " | ".join(f"{shape} | time | TTFT" for shape in shapes), "|")
    print("| --- | --: " + "| --: " * 6 + "|")
    for lengths, rate in TRAFFIC:
        for weight in WEIGHTS:
            with patch("dp_extproc.scheduling.picker._DECODE_WEIGHT", weight):
                print(f"| {lengths}, {rate:g}/s | {weight:g} | {' | '.join(cells(lengths, rate))} |", flush=True)


if __name__ == "__main__":
    main()
