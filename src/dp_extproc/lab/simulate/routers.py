"""Schedule requests of a simulation: by the engines themselves, with full knowledge, or by the service's own code."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from random import Random

from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import PolicySettings
from dp_extproc.engines.model import MODE_OF, Endpoint, EngineFacts, LoadPage, Role, Version
from dp_extproc.estimators.token_ratio import START as BYTES_PER_TOKEN
from dp_extproc.lab.engine.scheduler.work import Stage
from dp_extproc.lab.simulate.fleet import Fleet
from dp_extproc.lab.simulate.simulation import EngineRanks, Placement, Simulation
from dp_extproc.lab.workload.trace import TraceRequest
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.decode import ROOM, step_cost
from dp_extproc.load.endpoint import StepCosts
from dp_extproc.load.in_flight import InFlight
from dp_extproc.load.prefill import LATER_STEPS, LATER_WEIGHT, WAITING_COUNTED
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.load.tracker import InFlightTracker
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix
from dp_extproc.request.path import Api
from dp_extproc.request.prompt import Prompt
from dp_extproc.scheduling.filters import EndpointFilter
from dp_extproc.scheduling.pairing import Pairing
from dp_extproc.scheduling.picker import Picker

_POOL = "*"
_BLOCK = 256
"""Tokens of a block of a prompt's chain: what a kibibyte of text has."""


class EnginesOwn:
    """Leave the ranks to the engines, as a router without ranks does."""

    reads_gauges = False

    def __init__(self, simulation: Simulation) -> None:
        self._ranks = simulation.engine_ranks

    def place(self, number: int, request: TraceRequest, now: float) -> Placement:  # noqa: ARG002 - the protocol's
        return self._ranks.place()

    def prefill_answered(self, number: int, now: float) -> None: ...
    def first_token(self, number: int, now: float) -> None: ...
    def ended(self, number: int, now: float) -> None: ...
    def scraped(self, role: Role, engine: int, page: LoadPage, started: float, now: float) -> None: ...


class Clairvoyant(EnginesOwn):
    """Schedule with the state of every engine and the length of every answer, but without the future.

    On prefill it minimises when the request is done, plus the delay of waiting requests, on the true queues and caches.
    On decode it weighs each sequence by how long it will still run.
    """

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._simulation = simulation
        costs = simulation.fleet.costs
        self._step_tokens = costs.prefill_step / costs.prefill_token
        self._request_tokens = costs.decode_request / costs.decode_token

    def place(self, number: int, request: TraceRequest, now: float) -> Placement:  # noqa: ARG002 - the protocol's
        if self._simulation.workers:
            return Placement(0, 0, *self._worker(request))
        return Placement(*self._prefill(request), *self._decode(request))

    def _prefill(self, request: TraceRequest) -> tuple[int, int]:
        simulation, fleet = self._simulation, self._simulation.fleet
        chunk = float(fleet.chunk or fleet.batch)
        best, found = math.inf, (0, 0)
        coming = [[0] * fleet.ranks for _ in simulation.prefills]
        for number, placement in simulation.on_the_way.items():
            coming[placement.prefill][placement.prefill_rank] += simulation.trace[number].prompt_tokens
        for index, engine in enumerate(simulation.prefills):
            queues = [engine.backlog(rank) + coming[index][rank] for rank in range(fleet.ranks)]
            slowness = fleet.slow_prefill if index == 0 else 1.0
            for group in engine.groups:
                members = [rank.dp_rank for rank in group.ranks]
                top = max(queues[rank] for rank in members)
                waiting = sum(len(rank.queued(Stage.WAITING)) for rank in group.ranks)
                rest = engine.rest_of_step(members[0])
                for rank in members:
                    queue = queues[rank]
                    after = queue + request.prompt_tokens - self._cached(request, index, rank)
                    steps = math.ceil(after / chunk)
                    longer = max(0.0, after - top)
                    cost = rest + steps * self._step_tokens + min(max(top, after), steps * chunk)
                    delayed = min(waiting, WAITING_COUNTED) / max(1, math.ceil(top / chunk))
                    later = LATER_WEIGHT * (min(longer, LATER_STEPS * chunk) if fleet.chunk else longer)
                    cost = (cost + delayed * longer + later) * slowness + 1e-6 * queue
                    if cost < best:
                        best, found = cost, (index, rank)
        return found

    def _cached(self, request: TraceRequest, engine: int, rank: int) -> int:
        if not self._simulation.fleet.prefix_cache:
            return 0
        return self._simulation.prefills[engine].cached(rank, request)

    def _decode(self, request: TraceRequest) -> tuple[int, int]:
        best, found = (True, math.inf), (0, 0)
        fleet = self._simulation.fleet
        for index, engine in enumerate(self._simulation.decodes):
            loads = [0.0] * fleet.ranks
            for rank in range(fleet.ranks):
                for steps, other in engine.ends_of(rank):
                    together = min(1.0, steps / max(1, request.output_tokens))
                    context = other.prompt_tokens + other.output_tokens - steps
                    loads[rank] += (context + self._request_tokens) * together
                loads[rank] += max(0, engine.promised[rank] - engine.context[rank])
            slowness = fleet.slow_decode if index == 0 else 1.0
            added = request.prompt_tokens + self._request_tokens
            for members in _members(fleet):
                top, low = max(loads[rank] for rank in members), min(loads[rank] for rank in members)
                lowest = next(rank for rank in members if loads[rank] == low)
                lacks_room = engine.requested_tokens(lowest) + request.prompt_tokens > ROOM * fleet.capacity
                slowed = sum(engine.sequences[rank] for rank in members)
                cost = step_cost(top, low + added, added / len(members), slowed) * slowness
                if (lacks_room, cost) < best:
                    best, found = (lacks_room, cost), (index, lowest)
        return found

    def _worker(self, request: TraceRequest) -> tuple[int, int]:
        """Weigh what the aggregated engines have, as decode does; what they have to compute counts twice."""
        best, found = math.inf, (0, 0)
        simulation, fleet = self._simulation, self._simulation.fleet
        coming = Counter[tuple[int, int]]()
        for number, placement in simulation.on_the_way.items():
            tokens = 2 * simulation.trace[number].prompt_tokens + self._request_tokens
            coming[placement.decode, placement.decode_rank] += round(tokens)
        for index, engine in enumerate(simulation.workers):
            loads = [
                coming[index, rank.dp_rank]
                + sum(
                    work.context + self._request_tokens + work.prompt_tokens - work.prefilled for work in rank.works()
                )
                for rank in engine.ranks
            ]
            slowness = fleet.slow_decode if index == 0 else 1.0
            added = 2 * request.prompt_tokens + self._request_tokens
            for members in _members(fleet):
                top, low = max(loads[rank] for rank in members), min(loads[rank] for rank in members)
                slowed = sum(sum(1 for _ in engine.ranks[rank].works()) for rank in members)
                cost = step_cost(top, low + added, added / len(members), slowed) * slowness
                if cost < best:
                    best, found = cost, (index, next(rank for rank in members if loads[rank] == low))
        return found


def _members(fleet: Fleet) -> list[range]:
    """Return the ranks of an engine that step together, group by group."""
    return [range(fleet.ranks)] if fleet.lockstep else [range(rank, rank + 1) for rank in range(fleet.ranks)]


class Ours:
    """Schedule with the service's own policies and reservations, in one or several replicas."""

    def __init__(self, simulation: Simulation, policy: PolicySettings, signal: LoadSignal) -> None:
        self.reads_gauges = signal is LoadSignal.SCRAPED
        self._affinity = policy.affinity.prefixes and simulation.fleet.prefix_cache
        self._simulation = simulation
        self._rng = simulation.rng
        around = simulation.around
        self.replicas = [
            _Replica(simulation, policy, signal, Random(simulation.rng.random())) for _ in range(around.replicas)
        ]
        self.placements: list[Placement] = []
        """Where each request went, in their order."""
        self._of: dict[int, _Replica] = {}

    def place(self, number: int, request: TraceRequest, now: float) -> Placement:
        replica = self._rng.choice(self.replicas)
        self._of[number] = replica
        prefix = self._prefix(request) if self._affinity else NO_PREFIX
        placement, record = replica.place(number, self._text_bytes(request), prefix, now)
        self._share(replica, lambda peer, now: peer.open_peer(number, record, now))
        self.placements.append(placement)
        return placement

    def prefill_answered(self, number: int, now: float) -> None:
        self._event(number, lambda replica, now: replica.attempts[number].prefill_answered(200, now), now)

    def first_token(self, number: int, now: float) -> None:
        self._event(number, lambda replica, now: replica.attempts[number].first_byte(200, now), now)

    def ended(self, number: int, now: float) -> None:
        self._event(number, lambda replica, now: replica.attempts.pop(number).end(now), now)
        del self._of[number]

    def scraped(self, role: Role, engine: int, page: LoadPage, started: float, now: float) -> None:
        for replica in self.replicas:
            replica.fleet.sampled(replica.endpoints[role][engine], page, started, now)

    def _event(self, number: int, event: "Callable[[_Replica, float], None]", now: float) -> None:
        replica = self._of[number]
        event(replica, now)
        self._share(replica, event)

    def _share(self, replica: "_Replica", event: "Callable[[_Replica, float], None]") -> None:
        delay = self._simulation.around.sync
        if delay is not None:
            for peer in self.replicas:
                if peer is not replica:
                    self._simulation.after(delay, partial(event, peer))

    def _text_bytes(self, request: TraceRequest) -> int:
        """Return the length in bytes of the text that the prompt is estimated by."""
        around = self._simulation.around
        tokens = request.prompt_tokens * around.bias
        if around.error_sigma:
            tokens *= self._rng.lognormvariate(0, around.error_sigma)
        if around.underrated and self._rng.random() < around.underrated:
            tokens /= 4
        return round(tokens * BYTES_PER_TOKEN)

    def _prefix(self, request: TraceRequest) -> Prefix:
        blocks, chain = [], 0
        for segment in request.prompt:
            for start in range(0, segment.tokens, _BLOCK):
                chain = hash((chain, segment.text, min(_BLOCK, segment.tokens - start))) & (1 << 64) - 1
                blocks.append((chain, min(_BLOCK, segment.tokens - start)))
        return Prefix(tuple(block for block, _ in blocks), tuple(accumulate(size for _, size in blocks)))


class _Replica:
    """One replica of the service."""

    def __init__(self, simulation: Simulation, policy: PolicySettings, signal: LoadSignal, rng: Random) -> None:
        fleet = simulation.fleet
        sizes = (
            {Role.PREFILL: fleet.prefill, Role.DECODE: fleet.decode} if fleet.prefill else {Role.WORKER: fleet.decode}
        )
        self.endpoints = {
            role: [
                Endpoint(f"http://{role}-{index}:1", "", 1, _POOL, role, group=fleet.group_of(role, index))
                for index in range(count)
            ]
            for role, count in sizes.items()
        }
        costs = fleet.costs
        self.fleet = LoadCache(
            [endpoint for endpoints in self.endpoints.values() for endpoint in endpoints],
            simulation.around.stale_after,
            StepCosts(costs.prefill_step / costs.prefill_token, costs.decode_request / costs.decode_token),
        )
        self._index = {
            endpoint.url: index for endpoints in self.endpoints.values() for index, endpoint in enumerate(endpoints)
        }
        for role, endpoints in self.endpoints.items():
            for endpoint in endpoints:
                self.fleet.discovered(endpoint, endpoint.url, _facts(role, fleet), 0.0)
        self._filters = EndpointFilter(self.fleet)
        self._picker = Picker(policy, signal, self.fleet.prefixes[_POOL], rng)
        self._tracker = InFlightTracker(self.fleet)
        self._rng = rng
        self._ranks = fleet.ranks
        self._engine_ranks: EngineRanks = simulation.engine_ranks
        self.attempts: dict[int, InFlight] = {}

    def place(self, number: int, text_bytes: int, prefix: Prefix, now: float) -> tuple[Placement, PlacementRecord]:
        tokens = self.fleet.ratios[_POOL].estimate(Prompt(text_bytes, 0, None))
        cost = RequestCost(tokens, prefix=prefix, text_bytes=text_bytes)
        targets = self._picker.pick(self._pairing(now), cost, now)
        prefill, decode = targets.prefill, targets.decode
        self.attempts[number] = self._tracker.open(prefill, decode, cost, now)
        decode_engine = self._index[decode.endpoint.url]
        prefill_engine, prefill_rank = 0, 0
        if prefill is not None:
            prefill_engine = self._index[prefill.endpoint.url]
            prefill_rank = self._rng.randrange(self._ranks) if prefill.rank is None else prefill.rank
        placement = Placement(
            prefill_engine,
            prefill_rank,
            decode_engine,
            self._engine_ranks.decode_rank(decode_engine) if decode.rank is None else decode.rank,
        )
        record = PlacementRecord(
            _POOL,
            cost,
            decode.endpoint.url,
            decode.rank,
            None if prefill is None else prefill.endpoint.url,
            None if prefill is None else prefill.rank,
            (prefill or decode).cached,
        )
        return placement, record

    def _pairing(self, now: float) -> Pairing:
        if Role.WORKER in self.endpoints:
            return Pairing((), self._filters.capable(_POOL, Role.WORKER, Api.CHAT, now))
        prefills = self._filters.capable(_POOL, Role.PREFILL, Api.CHAT, now)
        decodes = self._filters.capable(_POOL, Role.DECODE, Api.CHAT, now)
        matches = self.fleet.matches.get(_POOL, ())
        of = {prefill: match for match in matches for prefill in match.prefills}
        return Pairing(prefills, decodes, of or None)

    def open_peer(self, number: int, record: PlacementRecord, now: float) -> None:
        """Open the reservations of a peer's attempt."""
        self.attempts[number] = self._tracker.open_peer(record, now)


def _facts(role: Role, fleet: Fleet) -> EngineFacts:
    on_prefill = role is Role.PREFILL
    return EngineFacts(
        version=Version(0, 5, 23),
        dp_ranks=fleet.ranks,
        mode=MODE_OF[role],
        dp_attention=fleet.lockstep,
        served_model=None,
        bootstrap_port=8998,
        load_balance_method=None,
        follows_rooms=on_prefill,
        step_tokens=fleet.chunk or fleet.batch,
        chunked=fleet.chunk > 0,
        prefix_cache=fleet.prefix_cache,
    )
