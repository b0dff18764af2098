"""The share of prefill at steady rates, beside the time to first token: where the share is 1, the fleet is full."""

import statistics
from dataclasses import dataclass

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.model import Role
from dp_extproc.lab.simulate.routers import Ours
from dp_extproc.lab.simulate.settings import SETTINGS
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.lab.workload.generate import make_trace
from dp_extproc.load.autoscaling import Autoscaling, Measure
from dp_extproc.load.records import NO_WORK

SETTING = "4p2d8-agent"
RATES = (5, 20, 30, 34, 38, 42, 45, 48)
"""Requests per second."""
SECONDS = 130
_WARM_UP = 30.0
_EVERY = 5.0
"""Seconds between two readings of the signal."""


@dataclass(frozen=True, slots=True)
class Steady:
    """The result of one rate."""

    rate: int
    share: float
    ttft_mean: float
    """Seconds."""
    ttft_p99: float


def run_steady(rate: int) -> Steady:
    """Run a steady rate, and read the signal all the time."""
    setting = SETTINGS[SETTING]
    trace = make_trace(setting.lengths, rate * SECONDS, rate, 1)
    simulation = Simulation(setting.fleet, setting.around, trace, 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    autoscaling = Autoscaling(router.replicas[0].fleet, AutoscalingSettings(), lambda _pool: NO_WORK)
    shares: list[float] = []

    def read(now: float) -> None:
        if now > trace[-1].arrival:
            return
        if now > _WARM_UP:
            shares.extend(
                each.measures[Measure.PROMPT_RATE] for each in autoscaling.signals(now) if each.role is Role.PREFILL
            )
        simulation.after(_EVERY, read)

    simulation.after(_EVERY, read)
    summary = simulation.run(router).summary()
    return Steady(rate, statistics.fmean(shares), summary["ttft_mean"] / 1000, summary["ttft_p99"] / 1000)
