"""Autoscaling signals of a pool and role: which share of its capacity is taken, and how many endpoints it should have.

1. Prefill is compared by time. Its use is the share of their time that the engines need for the prompt tokens that
   arrive, and the time that the waiting ones take, divided by the time within which they shall be computed. The KV
   cache of prefill is no measure: it fills when decode is slow.
2. Decode is compared by space. Its use is the larger of two shares: the tokens of the KV caches, and the sequences
   that run at a time.
3. A request that waits counts for one role alone. It waits for decode if decode has no room for it, else for prefill.
   Otherwise a lack of engines in one role would add engines to both.
4. Aggregated engines do both, so the larger use counts. How fast they compute prompts is unknown until prompts have
   waited on all ranks of one.
5. Requests in the admission queue count as if they were placed.
6. The endpoints that count are those that a request could go to: the fresh ones, or else the stale ones, without those
   that are ejected or not ready. Neither the capacity nor the load of the others counts. Without a known capacity there
   is no signal: an autoscaler without a signal changes nothing. Nor do arrivals count while those at the other replicas
   are unknown: the engines would seem to have a fraction of their work.
7. A use may exceed 1. The wanted endpoints are proportional to it: ``endpoints * use / target``, at least 1. They may
   be a fraction, which the autoscaler rounds up, since it also decides which differences are too small to act on.

The signals are computed when they are read, from state that scheduling keeps anyway. Nothing here changes any state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.prefill import USUAL_TIME_PER_TOKEN
from dp_extproc.load.records import NO_WORK, Work
from dp_extproc.load.room import Room


class Measure(StrEnum):
    """A share of the capacity of a role."""

    PROMPT_RATE = "prompt_rate"
    """Prompt tokens that arrive per second, of those that the engines can compute per second."""
    PROMPT_QUEUE = "prompt_queue"
    """Seconds that the waiting prompt tokens take, of those that they may take."""
    KV_CACHE = "kv_cache"
    """Tokens of the KV caches."""
    REQUESTS = "requests"
    """Sequences that the engines run at a time."""


@dataclass(frozen=True, slots=True)
class Signal:
    """The signals of one role of one pool."""

    pool: str
    role: Role
    endpoints: int
    """Endpoints that count; at least one."""
    measures: Mapping[Measure, float]
    """At least one."""
    target: float

    @property
    def use(self) -> float:
        """The share of the capacity that is taken. It may exceed 1."""
        known = self.measures.get
        prompts = known(Measure.PROMPT_RATE, 0.0) + known(Measure.PROMPT_QUEUE, 0.0)
        return max(prompts, known(Measure.KV_CACHE, 0.0), known(Measure.REQUESTS, 0.0))

    @property
    def saturation(self) -> float:
        """The share of the capacity that is taken, at most 1."""
        return min(1.0, self.use)

    @property
    def wanted(self) -> float:
        """The number of endpoints with which the target share would be taken; at least 1, and may be a fraction."""
        return max(1.0, self.endpoints * self.use / self.target)


class Autoscaling:
    """Computes the signals of all pools and roles."""

    def __init__(
        self,
        loads: LoadCache,
        settings: AutoscalingSettings,
        queued: Callable[[str], Work],
        has_all_arrivals: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin with settings that may be replaced later.

        Args:
            loads: The load cache.
            settings: The targets.
            queued: Returns the work in a pool's admission queue.
            has_all_arrivals: Returns whether requests that arrive at other replicas are known.
        """
        self.settings = settings
        self._loads = loads
        self._queued = queued
        self._has_all_arrivals = has_all_arrivals

    def signals(self, now: float) -> Iterator[Signal]:
        """Compute the signal of each pool and role that has endpoints with a known capacity."""
        places = dict.fromkeys((endpoint.pool, endpoint.role) for endpoint in self._loads.endpoints)
        targets = {
            Role.PREFILL: self.settings.prefill_target,
            Role.DECODE: self.settings.decode_target,
            Role.WORKER: self.settings.worker_target,
        }
        for pool, role in places:
            endpoints = self._counted(pool, role, now)
            measures = dict(self._measures(pool, role, endpoints, now))
            if measures:
                yield Signal(pool, role, len(endpoints), measures, targets[role])

    def _counted(self, pool: str, role: Role, now: float) -> Sequence[EndpointLoad]:
        _, freshest = self._loads.best_known(self._loads.known(pool, role), now)
        return [each for each in freshest if each.is_ready and not each.health.is_ejected(now)] or freshest

    def _measures(
        self, pool: str, role: Role, endpoints: Sequence[EndpointLoad], now: float
    ) -> Iterator[tuple[Measure, float]]:
        queued = self._queued(pool)
        if role is not Role.DECODE and self._has_all_arrivals() and (capacity := sum(_prompt_rates(endpoints))):
            waiting = _waiting(endpoints, queued)
            if role is Role.PREFILL:
                waiting = self._without_excess(waiting, pool, queued, now)
            yield Measure.PROMPT_RATE, self._loads.arrivals[pool].per_second(now) / capacity
            yield Measure.PROMPT_QUEUE, waiting.tokens / capacity / self.settings.prefill_queue
        if role is not Role.PREFILL:
            room, elsewhere = Room.of(endpoints, now, queued), NO_WORK
            if role is Role.DECODE:
                placed = _waiting(self._counted(pool, Role.PREFILL, now))
                elsewhere = self._without_excess(placed, pool, queued, now)
            if room.capacity:
                yield Measure.KV_CACHE, max(0.0, room.tokens - elsewhere.tokens) / room.capacity
            if room.sequences:
                yield Measure.REQUESTS, max(0.0, room.requests - elsewhere.requests) / room.sequences

    def _without_excess(self, waiting: Work, pool: str, queued: Work, now: float) -> Work:
        """Return the part of waiting prompts that waits for prefill: decode has room for it."""
        excess = Room.of(self._counted(pool, Role.DECODE, now), now, queued).excess
        if excess >= waiting.tokens:
            return NO_WORK
        share = 1 - excess / waiting.tokens
        return Work(waiting.tokens * share, waiting.requests * share)


def _waiting(endpoints: Iterable[EndpointLoad], queued: Work = NO_WORK) -> Work:
    """Add up the prompts that no step has taken in yet, and those that are queued."""
    tokens, requests = queued
    for endpoint in endpoints:
        waiting = endpoint.waiting_prompts
        tokens += waiting.tokens
        requests += waiting.requests
    return Work(tokens, requests)


def _prompt_rates(endpoints: Iterable[EndpointLoad]) -> Sequence[float]:
    """Return the prompt tokens per second that each endpoint can compute.

    An endpoint whose rate is unknown counts as the average of the others. If none is known, those of prefill have the
    rate that scheduling expects, and aggregated ones have none.
    """
    rates = [(each, each.prompt_rate) for each in endpoints]
    known = [(each, rate) for each, rate in rates if rate is not None]
    if known:
        usual = sum(rate for _, rate in known) / sum(len(each.ranks) for each, _ in known)
    else:
        usual = 1 / USUAL_TIME_PER_TOKEN if any(each.role is Role.PREFILL for each, _ in rates) else 0.0
    return [usual * len(each.ranks) if rate is None else rate for each, rate in rates]
