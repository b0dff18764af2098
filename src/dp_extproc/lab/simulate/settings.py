"""Define settings to simulate by name: the fleets and kinds of traffic of docs/scheduling.md."""

from dataclasses import dataclass, field
from typing import Final

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.workload.generate import SESSIONS


@dataclass(frozen=True, slots=True)
class Setting:
    """A fleet, its traffic and its surroundings."""

    fleet: Fleet
    lengths: str
    rate: float
    """Requests per second; chosen so that the engines' own placement has high load, but keeps up."""
    requests: int = 4000
    burst: float = 1.0
    concurrency: int | None = None
    """Requests at a time, in place of a rate."""
    around: Surroundings = field(default_factory=Surroundings)


_FAST: Final = Costs()
"""The step costs of the stand-in: a step takes a third to a fifth of the default here."""
_SEEDS_FLEET: Final = Fleet(prefill=1, decode=1, ranks=2)

SETTINGS: Final[dict[str, Setting]] = {
    "1p1d2-seed-ttft": Setting(_SEEDS_FLEET, "seed-prompts", 6.0, 1500),
    "1p1d2-seed-ttft-saturated": Setting(_SEEDS_FLEET, "seed-prompts", 6.7, 1500),
    "1p1d2-seed-ttft-closed": Setting(_SEEDS_FLEET, "seed-prompts", 1.0, 1500, concurrency=8),
    "1p1d2-seed": Setting(_SEEDS_FLEET, "seed", 5.0, 1500),
    "1p1d8-agent": Setting(Fleet(prefill=1, decode=1), "agent", 7.5, 2000),
    "4p2d8-agent": Setting(Fleet(), "agent", 30.0),
    "4p2d8-bursts": Setting(Fleet(), "agent", 24.0, burst=2.5),
    "4p2d8-azure": Setting(Fleet(), "azure", 140.0, 6000),
    "4p2d8-sharegpt": Setting(Fleet(), "sharegpt", 400.0, 6000),
    "4p2d8-unchunked": Setting(Fleet(chunk=0), "agent", 24.0),
    "8p2d8-long": Setting(Fleet(prefill=8), "long", 38.0),
    "4p2d8-sessions": Setting(Fleet(prefix_cache=True), SESSIONS, 50.0, 8000),
    "2p2d4-plain": Setting(Fleet(2, 2, 4, lockstep=False), "agent", 10.0, 1500),
    "2p2d4-plain-unchunked": Setting(Fleet(2, 2, 4, lockstep=False, chunk=0), "agent", 10.0, 1500),
    "2p2d4-plain-fast": Setting(Fleet(2, 2, 4, lockstep=False, costs=_FAST), "agent", 40.0, 1500),
    "8p8d1-agent": Setting(Fleet(8, 8, 1), "agent", 10.0, 1500),
    "2w4-plain": Setting(Fleet(0, 2, 4, lockstep=False), "agent", 8.0, 1500),
    "2w4-plain-unchunked-fast": Setting(Fleet(0, 2, 4, lockstep=False, chunk=0, costs=_FAST), "agent", 25.0, 1500),
    "8p8d32-agent": Setting(Fleet(prefill=8, decode=8, ranks=32), "agent", 220.0),
}
