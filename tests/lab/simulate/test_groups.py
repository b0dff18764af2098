"""Without weights, load divides the requests among revision groups by their capacity, in simulated fleets."""

from collections import Counter

import pytest

from dp_extproc.config import LoadSignal, PolicySettings
from dp_extproc.engines.model import Role
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.outcome import RunResult
from dp_extproc.lab.simulate.routers import Ours
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.lab.workload.generate import make_trace

Groups = tuple[tuple[int, int], ...]


def run(groups: Groups, lengths: str, rate: float, requests: int = 1200) -> tuple[Counter[str | None], RunResult]:
    """Return the share of each group in percent, and the results."""
    prefill, decode = (sum(numbers) for numbers in zip(*groups, strict=True))
    fleet = Fleet(prefill=prefill, decode=decode, groups=groups)
    simulation = Simulation(fleet, Surroundings(), make_trace(lengths, requests, rate, 1), 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    result = simulation.run(router)
    shares: Counter[str | None] = Counter()
    for each in router.placements:
        group = fleet.group_of(Role.PREFILL, each.prefill)
        assert group == fleet.group_of(Role.DECODE, each.decode), "a pair crosses groups"
        shares[group] += 1
    return Counter({group: round(100 * count / requests) for group, count in shares.items()}), result


@pytest.mark.parametrize(("lengths", "rate"), [("agent", 28.0), ("azure", 110.0)])
@pytest.mark.parametrize("groups", [((3, 3), (1, 1)), ((2, 2), (2, 2))], ids=str)
def test_shares_follow_capacity(groups: Groups, lengths: str, rate: float) -> None:
    """A group with three quarters of the engines gets about three quarters of the requests."""
    shares, _ = run(groups, lengths, rate)
    engines = sum(prefill + decode for prefill, decode in groups)

    for number, group in enumerate(groups, start=1):
        assert shares[f"v{number}"] == pytest.approx(100 * sum(group) / engines, abs=8)


def test_group_with_little_decode_gets_less_than_its_prefill_would_take() -> None:
    """In a rollout that begins with prefill, decode of the new revision would be overloaded otherwise."""
    shares, result = run(((2, 4), (2, 1)), "sharegpt", 300.0)
    _, even = run(((4, 5),), "sharegpt", 300.0)

    assert shares["v2"] < 35
    assert result.summary()["tpot_mean"] < 1.05 * even.summary()["tpot_mean"]
