"""A simulated fleet whose engines are added and removed while it runs, and what an autoscaler can see of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.autoscaling.hpa import SYNC_SECONDS, Autoscaler
from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.model import LoadPage, Role
from dp_extproc.lab.engine.scheduler.work import Stage
from dp_extproc.lab.simulate.routers import Ours
from dp_extproc.lab.simulate.simulation import Simulation
from dp_extproc.load.autoscaling import Autoscaling, Signal
from dp_extproc.load.records import NO_WORK

SCRAPE_SECONDS: Final = 15.0
"""Seconds between two scrapes of Prometheus."""
KEPT: Final = 4
"""Scrapes that a query can average: those of a minute."""
ROLES: Final = (Role.PREFILL, Role.DECODE)


class ScaledRouter(Ours):
    """The service's own router, over those engines of the fleet that are members at present."""

    def __init__(self, simulation: Simulation, members: dict[Role, int]) -> None:
        super().__init__(simulation, PolicySettings(), LoadSignal.ESTIMATE)
        (self._replica,) = self.replicas
        self.cache = self._replica.fleet
        self._facts = {url: (load.address, load.facts) for url, load in self.cache.by_url.items()}
        self.set_members(members, 0.0)

    def set_members(self, members: dict[Role, int], now: float) -> None:
        """Use the first engines of each role from now on. The others drain."""
        wanted = [each for role in ROLES for each in self._replica.endpoints[role][: members[role]]]
        self.cache.update(wanted, self.cache.stale_after)
        for endpoint in wanted:
            if endpoint.url not in self.cache.by_url:
                self.cache.discovered(endpoint, *self._facts[endpoint.url], now)

    def scraped(self, role: Role, engine: int, page: LoadPage, started: float, now: float) -> None:
        if self._replica.endpoints[role][engine].url in self.cache.by_url:
            super().scraped(role, engine, page, started, now)


@dataclass(frozen=True, slots=True)
class Scrape:
    """What Prometheus has of one role at one moment."""

    signal: Signal | None
    """The signal of the service."""
    queues: tuple[int, ...]
    """Requests that wait in each ready engine."""
    busy: tuple[float, ...]
    """Share of the time since the scrape before in which each ready engine was in a step, as GPU utilization shows."""


Propose = Callable[[Sequence[Scrape], int], int]
"""Proposes a number of replicas by the last scrapes and the present replicas."""


class ScaledFleet:
    """Runs an autoscaler for each role over a simulation."""

    def __init__(
        self,
        simulation: Simulation,
        scalers: dict[Role, Autoscaler],
        propose: Propose,
        settings: AutoscalingSettings,
        start_seconds: float,
    ) -> None:
        self._simulation = simulation
        self._scalers = scalers
        self._propose = propose
        self._start_seconds = start_seconds
        self.ready = {role: scalers[role].replicas for role in ROLES}
        self.router = ScaledRouter(simulation, self.ready)
        self._autoscaling = Autoscaling(self.router.cache, settings, lambda _pool: NO_WORK)
        self._starting: dict[Role, list[float]] = {role: [] for role in ROLES}
        """When each engine that starts will be ready."""
        self._busy = {role: [0.0] * len(self._engines(role)) for role in ROLES}
        self._scrapes: dict[Role, list[Scrape]] = {role: [] for role in ROLES}
        self.history: list[tuple[float, dict[Role, int]]] = []
        """Each sync: its time, and the replicas that are ordered from then on."""
        simulation.after(SCRAPE_SECONDS, self._scrape)
        simulation.after(SYNC_SECONDS + 1, self._sync)

    def _engines(self, role: Role) -> list[object]:
        return [*(self._simulation.prefills if role is Role.PREFILL else self._simulation.decodes)]

    def _scrape(self, now: float) -> None:
        signals = {signal.role: signal for signal in self._autoscaling.signals(now)}
        for role in ROLES:
            busy = self._seconds_in_steps(role, now)
            shares = [(new - old) / SCRAPE_SECONDS for new, old in zip(busy, self._busy[role], strict=True)]
            self._busy[role] = busy
            ready = self.ready[role]
            scrape = Scrape(signals.get(role), tuple(self._queues(role)[:ready]), tuple(shares[:ready]))
            self._scrapes[role] = [*self._scrapes[role], scrape][-KEPT:]
        self._simulation.after(SCRAPE_SECONDS, self._scrape)

    def _seconds_in_steps(self, role: Role, now: float) -> list[float]:
        if role is Role.PREFILL:
            return [each.busy / len(each.ranks) for each in self._simulation.prefills]
        pages = [each.page(now, gauges=False) for each in self._simulation.decodes]
        return [max(rank.decoded.seconds for rank in page.ranks if rank.decoded is not None) for page in pages]

    def _queues(self, role: Role) -> list[int]:
        if role is Role.PREFILL:
            return [sum(len(rank.queued(Stage.WAITING)) for rank in each.ranks) for each in self._simulation.prefills]
        return [each.unaccepted for each in self._simulation.decodes]

    def _sync(self, now: float) -> None:
        for role in ROLES:
            scaler, starting = self._scalers[role], self._starting[role]
            before = scaler.replicas
            after = scaler.sync(now, self._propose(self._scrapes[role], before))
            starting += [now + self._start_seconds] * (after - before)
            while self.ready[role] + len(starting) > after:  # the youngest ones go first
                if starting:
                    starting.pop()
                else:
                    self.ready[role] -= 1
                    self.router.set_members(self.ready, now)
        self.history.append((now, {role: self._scalers[role].replicas for role in ROLES}))
        self._simulation.after(self._start_seconds, self._join)
        self._simulation.after(SYNC_SECONDS, self._sync)

    def _join(self, now: float) -> None:
        for role in ROLES:
            ready = [at for at in self._starting[role] if at <= now + 1e-6]
            if ready:
                self._starting[role] = self._starting[role][len(ready) :]
                self.ready[role] += len(ready)
                self.router.set_members(self.ready, now)
