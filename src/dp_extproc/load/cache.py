"""The load cache: every discovered endpoint with its load, fed by the events of engines, and by pool and role."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.listener import GONE, EngineFailure, FailureKind
from dp_extproc.engines.model import MODE_OF, Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.estimators.arrivals import ArrivalRate
from dp_extproc.estimators.token_ratio import TokenRatio
from dp_extproc.load.endpoint import (
    DEFAULT_COSTS,
    DEFAULT_HEALTH,
    EndpointLoad,
    Freshness,
    StepCosts,
)
from dp_extproc.load.health import Health
from dp_extproc.load.in_flight import nothing
from dp_extproc.load.matching import Match, find_matches
from dp_extproc.load.neighbours import compare_pace, compare_prefill, note_room
from dp_extproc.load.room import Room
from dp_extproc.load.step_group import RankLoad
from dp_extproc.prefix_cache.index import PrefixIndex


class LoadCache:
    """The endpoints and what is learned of them. Implements :class:`dp_extproc.engines.listener.EngineListener`."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        stale_after: float,
        costs: StepCosts = DEFAULT_COSTS,
        health: OutlierDetectionSettings = DEFAULT_HEALTH,
        made_room: Callable[[], None] = nothing,
        *,
        pools: Iterable[str] = (),
    ) -> None:
        """Begin without a discovered endpoint. Events by which a queued request may find room call *made_room*.

        *pools* names the pools that may have no endpoint at present.
        """
        self.endpoints = tuple(endpoints)
        self.stale_after = stale_after
        """Seconds after which a sample is stale."""
        self._costs = costs
        self._health = health
        self._made_room = made_room
        self.generation = 0
        """Grows with each event after which the filters of scheduling may find other endpoints.

        These events change facts, addresses, freshness, membership, or which endpoints are unhealthy. Without one, an
        endpoint changes for the filters by the passing of time alone: it grows stale, or its ejection ends.
        """
        self._unhealthy: tuple[int, Sequence[EndpointLoad]] = (0, ())
        """A generation, and the unhealthy endpoints as of it."""
        self.by_url: dict[str, EndpointLoad] = {}
        """The endpoints that have been discovered, by URL."""
        self.failures: dict[str, EngineFailure] = {}
        """The present failure of each endpoint that has one, by URL."""
        names = _pool_names(self.endpoints, pools)
        self.ratios = {pool: TokenRatio() for pool in names}
        """The bytes per token of each pool."""
        self.arrivals = {pool: ArrivalRate() for pool in names}
        """The rate of prompt tokens that the engines of each pool have to compute."""
        self.prefixes: dict[str, PrefixIndex[RankLoad]] = {pool: PrefixIndex() for pool in names}
        """The prefix index of each pool."""
        self._draining: list[EndpointLoad] = []
        self._by_role: dict[tuple[str, Role], list[EndpointLoad]] = {}
        """The endpoints of each pool and role, in the order of the configuration."""
        self._matches: dict[str, tuple[Match, ...]] = {}
        self._is_indexed = True
        """Whether :attr:`_by_role` and :attr:`_matches` are up to date."""
        self.grouped = _grouped(self.endpoints)
        """The pools with an endpoint that has a revision group."""
        self.indexings = 0
        """Grows with each change after which :attr:`matches` or :meth:`known` may return others."""
        self._pages: Counter[tuple[str, Role]] = Counter()
        """Load pages since the endpoints of a pool and role were last compared."""

    @property
    def unhealthy(self) -> Sequence[EndpointLoad]:
        """Endpoints that are ejected, or have not succeeded since, or whose engine is not ready."""
        generation, found = self._unhealthy
        if generation != self.generation:
            found = [load for load in self.by_url.values() if load.health.is_unhealthy or not load.is_ready]
            self._unhealthy = (self.generation, found)
        return found

    @property
    def draining(self) -> list[EndpointLoad]:
        """Endpoints that are no longer configured, or whose engine has restarted, with requests still in flight."""
        return [load for load in self._draining if load.reservations]

    @property
    def matches(self) -> dict[str, tuple[Match, ...]]:
        """The matches of each pool in which not all prefill endpoints can be paired with all decode endpoints."""
        self._index()
        return self._matches

    def update(self, endpoints: Iterable[Endpoint], stale_after: float, pools: Iterable[str] = ()) -> None:
        """Change to other endpoints. The same engine in the same role keeps its load and reservations.

        An endpoint that is left out gets no request, and drains. *pools* names pools that may have no endpoint.
        """
        self.endpoints = tuple(endpoints)
        self.grouped = _grouped(self.endpoints)
        self.stale_after = stale_after
        names = _pool_names(self.endpoints, pools)
        drained = self.draining
        before = [*drained, *self.by_url.values()]
        returning = set(drained)
        kept = _kept(before, self.endpoints)
        self._rename_pools(kept, before, names)
        for endpoint, load in kept.items():
            if load in returning:  # failures from before it was drained do not count
                load.health = Health(self._health, self._change)
            if load.pool != endpoint.pool:
                self._forget_prefixes(load)
            load.configured = endpoint
        self.by_url = {endpoint.url: load for endpoint, load in kept.items()}
        left = [load for load in before if self.by_url.get(load.url) is not load]
        for load in left:
            self._forget_prefixes(load)
        self._draining = [load for load in left if load.reservations]
        self.failures = {each.url: self.failures[each.url] for each in self.endpoints if each.url in self.failures}
        self.ratios = {pool: self.ratios.get(pool) or TokenRatio() for pool in names}
        self.arrivals = {pool: self.arrivals.get(pool) or ArrivalRate() for pool in names}
        self.prefixes = {pool: self.prefixes.get(pool) or PrefixIndex() for pool in names}
        for pool, ratio in self.ratios.items():
            ratio.forget_all_but({each.url for each in self.endpoints if each.pool == pool})
        places = {(each.pool, each.role) for each in self.endpoints}
        self._pages = Counter({place: pages for place, pages in self._pages.items() if place in places})
        self._reindex()

    def _rename_pools(
        self, kept: Mapping[Endpoint, EndpointLoad], before: Iterable[EndpointLoad], pools: Collection[str]
    ) -> None:
        """Keep what was learned of a pool that is gone, for a new pool that has endpoints of it.

        A pool is named after its models, so one more model gives it another name.
        """
        for endpoint, load in kept.items():
            if endpoint.pool in self.ratios or load.pool in pools or load.pool not in self.ratios:
                continue
            old, new = load.pool, endpoint.pool
            self.ratios[new], self.prefixes[new] = self.ratios.pop(old), self.prefixes.pop(old)
            self.arrivals[new] = self.arrivals.pop(old)
            for each in before:
                if each.pool == old:
                    each.configured = replace(each.configured, pool=new)

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Note the facts of an engine. If it has become another one (restarted, upgraded), it starts without load."""
        self._change()  # the address may be another
        known = self.by_url.get(endpoint.url)
        capabilities = adapter_of(facts.kind).capabilities(facts)
        # Whether an engine reads x-override-* headers is found out later than its other facts.
        if known is not None and replace(known.facts, reads_overrides=facts.reads_overrides) == facts:
            known.address, known.facts, known.capabilities, known.is_ready = address, facts, capabilities, True
            return
        if known is not None:
            self._forget_prefixes(known)
            self._draining = [*self.draining, known]
        health = Health(self._health, self._change)
        self.by_url[endpoint.url] = EndpointLoad(endpoint, address, facts, capabilities, self._costs, health=health)
        self._reindex()
        self._made_room()

    def _change(self) -> None:
        self.generation += 1

    def _reindex(self) -> None:
        """Index before the next use. So the cost of hundreds of endpoints that are discovered at once is linear."""
        self._change()
        self.indexings += 1
        self._is_indexed = False

    def _index(self) -> None:
        """Index the endpoints by pool and role, and match those of both roles, if they have changed."""
        if self._is_indexed:
            return
        self._is_indexed = True
        self._by_role = {}
        for each in self.endpoints:
            load = self.by_url.get(each.url)
            # An engine in another mode than configured would never finish its requests.
            if load is not None and load.facts.mode is MODE_OF[each.role]:
                self._by_role.setdefault((each.pool, each.role), []).append(load)
        self._matches = {}
        for pool in self.ratios:
            found = find_matches(self.known(pool, Role.PREFILL), self.known(pool, Role.DECODE))
            if found is not None:
                self._matches[pool] = found

    def takes(self, endpoint: Endpoint, now: float) -> bool:
        """Return whether requests can be sent to an endpoint.

        Its engine has been discovered, is ready and not stale, and an endpoint of the other role can be paired with it.
        Without the last, one role of a new revision would take the place of its predecessors before the other is there.
        """
        load = self.by_url.get(endpoint.url)
        if load is None or not load.configured.is_same(endpoint):
            return False
        matches = self.matches.get(load.pool)
        has_pair = matches is None or any(load in match.prefills or load in match.decodes for match in matches)
        return has_pair and load.is_ready and load.freshness(now, self.stale_after) is not Freshness.STALE

    def known(self, pool: str, role: Role) -> Sequence[EndpointLoad]:
        """Return every endpoint of a pool and role whose engine runs in the mode of the role, however fresh it is."""
        self._index()
        return self._by_role.get((pool, role), ())

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Note a load page that was requested at *started*."""
        self.failures.pop(endpoint.url, None)
        load = self.by_url.get(endpoint.url)
        if load is None or load.freshness(now, self.stale_after) is not Freshness.FRESH:
            self._change()  # a further sample of a fresh endpoint changes nothing for the filters
        if load is not None:
            load.absorb(page.ranks, started, now)
            if load.review(now):
                self._change()
            restarted = load.detect_restart(page)
            if load.is_away or restarted:
                load.is_away = False
                load.health.recovered()
            if restarted:
                self._forget_prefixes(load)
            self._compare_prefixes(load, page, now)
            if endpoint.role is Role.WORKER:
                load.learn_prompt_rate(page, started)
            self._compare(endpoint.pool, endpoint.role, now)
        if endpoint.role is not Role.DECODE:
            self.ratios[endpoint.pool].counted(
                endpoint.url,
                page.prompt_tokens,
                started,
                idle=load is not None and not load.reserved_requests,
                external=False if load is None else load.has_external_requests,
            )
        self._made_room()

    def _compare(self, pool: str, role: Role, now: float) -> None:
        """Compare the endpoints only when each has had a page since, so that a page costs the same in every fleet."""
        self._pages[pool, role] += 1
        if self._pages[pool, role] >= len(peers := self.known(pool, role)):
            self._pages[pool, role] = 0
            if role is Role.PREFILL:
                compare_prefill(peers)
                return
            compare_pace(peers)
            if prefills := self.known(pool, Role.PREFILL):
                note_room(prefills, is_full=Room.of(self.best_known(peers, now)[1], now).is_full)

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Note that an endpoint could not be read. Its samples stay, and grow stale; at once if its engine is gone.

        The external load of stale samples is dropped, also if responses keep the endpoint fresh.
        """
        self._change()
        self.failures[endpoint.url] = failure
        load = self.by_url.get(endpoint.url)
        if load is None:
            return
        load.is_away = load.is_away or failure.is_away
        load.is_ready = load.is_ready and failure.kind is not FailureKind.NOT_READY and not failure.is_doubt
        if failure.kind in GONE:
            load.is_gone = True
            self._forget_prefixes(load)  # the next engine has an empty cache
        if failure.kind in GONE or now - load.sampled_at > self.stale_after:
            load.forget_external(now)

    def _compare_prefixes(self, load: EndpointLoad, page: LoadPage, now: float) -> None:
        """Correct the prefix index by the cached tokens that an engine has counted since the last such page."""
        if page.prompt_tokens is None or page.cached_prompt_tokens is None or load.role is Role.DECODE:
            return
        if load.prefix_truth.counted(page.prompt_tokens, page.cached_prompt_tokens, now):
            self._forget_prefixes(load)
        if (index := self.prefixes.get(load.pool)) is not None:
            share = load.prefix_truth.share(now)
            for rank in load.ranks:
                index.trust(rank, share)

    def _forget_prefixes(self, load: EndpointLoad) -> None:
        if (index := self.prefixes.get(load.pool)) is not None:  # the pool may no longer be configured
            for rank in load.ranks:
                index.forget(rank)

    def best_known(self, loads: Sequence[EndpointLoad], now: float) -> tuple[Freshness | None, list[EndpointLoad]]:
        """Return the freshest of some endpoints, and how fresh they are; None if there are no endpoints.

        These are the fresh ones, else the suspect ones, else the stale ones. Endpoints without any sample are used
        if all are without.
        """
        states = [load.freshness(now, self.stale_after) for load in loads]
        best = min(states, default=None)
        return best, [load for load, state in zip(loads, states, strict=True) if state is best]

    def discovered_in(self, pool: str) -> list[EndpointLoad]:
        """Return every discovered endpoint of a pool, whatever its role and mode."""
        return [load for load in self.by_url.values() if load.pool == pool]


def _kept(before: Iterable[EndpointLoad], endpoints: Iterable[Endpoint]) -> dict[Endpoint, EndpointLoad]:
    """Find the load of each endpoint whose engine had one in the same role. Of several the last one counts."""
    by_url: dict[str, list[EndpointLoad]] = {}
    for load in before:
        by_url.setdefault(load.url, []).append(load)
    return {
        endpoint: found[-1]
        for endpoint in endpoints
        if (found := [load for load in by_url.get(endpoint.url, ()) if load.configured.is_same(endpoint)])
    }


def _pool_names(endpoints: Iterable[Endpoint], pools: Iterable[str]) -> frozenset[str]:
    return frozenset(pools) | {endpoint.pool for endpoint in endpoints}


def _grouped(endpoints: Iterable[Endpoint]) -> frozenset[str]:
    return frozenset(endpoint.pool for endpoint in endpoints if endpoint.group is not None)
