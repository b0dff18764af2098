"""Simulate the measured traces: the best possible gain, and whether the simulation agrees with the measurement."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.balance.client import Load
from bench.balance.contenders import DEFAULT, ENGINES_OWN
from bench.balance.engines import COSTS, Size
from bench.balance.runs import settled_times
from dp_extproc.config.pools import PolicySettings
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.simulate.settings import Setting
from dp_extproc.lab.simulate.study import CLAIRVOYANT, Contender, run_once
from dp_extproc.lab.workload.trace import TraceRequest

_SIMULATED: Final = (Contender(ENGINES_OWN), Contender(DEFAULT, PolicySettings()), Contender(CLAIRVOYANT))


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """A simulated run."""

    contender: str
    seed: int
    times: dict[str, float]
    """Times, by the names of real runs."""

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a table."""
        return self.times


def simulate(seed: int, trace: Sequence[TraceRequest], size: Size, load: Load) -> list[SimulatedRun]:
    """Simulate a trace with the engines' own placement, with dp-extproc, and with the clairvoyant."""
    topology = size.topology
    fleet = Fleet(
        topology.prefill,
        topology.decode,
        topology.ranks,
        chunk=size.chunk,
        capacity=size.capacity,
        prefix_cache=True,
        costs=COSTS,
    )
    setting = Setting(fleet, lengths="", rate=0.0, concurrency=load.concurrency)
    results = [(each.name, run_once(setting, each, seed, tuple(trace))) for each in _SIMULATED]
    return [SimulatedRun(name, seed, settled_times(result.outcomes, len(trace))) for name, result in results]
