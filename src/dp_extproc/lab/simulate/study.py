"""Run several routers over the same traces, seed by seed, on all cores."""

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.lab.simulate.outcome import RunResult
from dp_extproc.lab.simulate.routers import Clairvoyant, EnginesOwn, Ours
from dp_extproc.lab.simulate.settings import Setting
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.lab.workload.generate import make_trace
from dp_extproc.lab.workload.trace import TraceRequest

ENGINES_OWN: Final = "engines' own"
CLAIRVOYANT: Final = "clairvoyant"


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to schedule requests."""

    name: str
    policy: PolicySettings | None = None
    """None for the contenders that are built in."""
    signal: LoadSignal = LoadSignal.ESTIMATE


@dataclass(frozen=True, slots=True)
class Study:
    """The setting, the contenders and the number of seeds of a study."""

    setting: Setting
    contenders: Sequence[Contender]
    seeds: int = 10
    trace: tuple[TraceRequest, ...] | None = None
    """A given trace in place of a made one; the seed then only decides ties."""


def run_once(setting: Setting, contender: Contender, seed: int, trace: tuple[TraceRequest, ...] | None) -> RunResult:
    """Run one trace through one router."""
    requests = trace or make_trace(setting.lengths, setting.requests, setting.rate, seed, burst=setting.burst)
    simulation = Simulation(setting.fleet, setting.around, requests, seed)
    if contender.policy is not None:
        return simulation.run(Ours(simulation, contender.policy, contender.signal), concurrency=setting.concurrency)
    router = Clairvoyant(simulation) if contender.name == CLAIRVOYANT else EnginesOwn(simulation)
    return simulation.run(router, concurrency=setting.concurrency)


def run_study(study: Study) -> dict[str, dict[str, float]]:
    """Run all contenders on all seeds.

    Returns:
        Per contender the means over all seeds of each number of :meth:`RunResult.summary`; and as ``ttft_gain``,
        ``tpot_gain``, ``tpot_short_gain`` and so on by how many percent the mean is below the first contender's, seed
        by seed, with half the width of the 95 % interval as ``ttft_gain_ci`` and so on.
    """
    jobs = [
        (study.setting, contender, seed, study.trace) for contender in study.contenders for seed in range(study.seeds)
    ]
    with multiprocessing.get_context("fork").Pool() as pool:
        summaries = pool.starmap(_summarise, jobs, chunksize=1)
    results: dict[str, dict[str, float]] = {}
    baseline = summaries[: study.seeds]
    for position, contender in enumerate(study.contenders):
        own = summaries[position * study.seeds : (position + 1) * study.seeds]
        results[contender.name] = {key: statistics.fmean(summary[key] for summary in own) for key in own[0]} | _gains(
            own, baseline
        )
    return results


def share_of_gain(results: Mapping[str, Mapping[str, float]], name: str, measure: str = "ttft") -> float | None:
    """Return which share of the clairvoyant's gain a contender has; None without a clairvoyant."""
    bound = results.get(CLAIRVOYANT, {}).get(f"{measure}_gain")
    return results[name][f"{measure}_gain"] / bound if bound else None


def with_around(setting: Setting, **changes: object) -> Setting:
    """Return the setting with other surroundings."""
    return replace(setting, around=replace(setting.around, **changes))  # type: ignore[arg-type]


def _summarise(
    setting: Setting, contender: Contender, seed: int, trace: tuple[TraceRequest, ...] | None
) -> dict[str, float]:
    return run_once(setting, contender, seed, trace).summary()


def _gains(own: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]]) -> dict[str, float]:
    gains: dict[str, float] = {}
    for measure in ("ttft", "tpot", "tpot_short", "tpot_long", "tpot_longest"):
        key = f"{measure}_mean"
        if key not in own[0]:
            continue
        values = [100 * (1 - mine[key] / base[key]) for mine, base in zip(own, baseline, strict=True)]
        gains[f"{measure}_gain"] = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        gains[f"{measure}_gain_ci"] = 1.96 * spread / len(values) ** 0.5
    return gains
