"""The load cache: every endpoint that has been discovered, fed by what the scraper observes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.agreement import MODE_OF
from dp_extproc.engines.capabilities import capabilities
from dp_extproc.engines.listener import GONE, EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.estimators.token_ratio import TokenRatio
from dp_extproc.load.endpoint import DEFAULT_COSTS, DEFAULT_HEALTH, EndpointLoad, Freshness, StepCosts, compare_pace
from dp_extproc.load.health import Health
from dp_extproc.load.in_flight import nothing
from dp_extproc.load.matching import Match, find_matches
from dp_extproc.load.rank import RankLoad
from dp_extproc.prefix_cache.index import PrefixIndex
from dp_extproc.request.path import Api


class LoadCache:
    """Who is there and how loaded. Implements :class:`dp_extproc.engines.listener.EngineListener`."""

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        stale_after: float,
        costs: StepCosts = DEFAULT_COSTS,
        health: OutlierDetectionSettings = DEFAULT_HEALTH,
        made_room: Callable[[], None] = nothing,
    ) -> None:
        """Begin with nobody known.

        Args:
            endpoints: As configured.
            stale_after: Seconds after which a sample is old.
            costs: Of steps.
            health: When to eject a server.
            made_room: Called when a server has told something by which a request may find room.
        """
        self.endpoints = tuple(endpoints)
        self.stale_after = stale_after
        self._costs = costs
        self._health = health
        self._made_room = made_room
        self.generation = 0
        """Grows with each event after which the filters of scheduling may find other endpoints.

        These events change facts, addresses, freshness, membership, or which endpoints are unhealthy. Without one, an
        endpoint changes for the filters by the passing of time alone: it grows stale, or its ejection ends.
        """
        self._unhealthy: tuple[int, Sequence[EndpointLoad]] = (0, ())
        """As of a generation."""
        self.by_url: dict[str, EndpointLoad] = {}
        """By URL; only endpoints that have told their facts."""
        self.failures: dict[str, EngineFailure] = {}
        """By URL; what is wrong at present."""
        self.ratios = {endpoint.pool: TokenRatio() for endpoint in self.endpoints}
        self.prefixes: dict[str, PrefixIndex[RankLoad]] = {endpoint.pool: PrefixIndex() for endpoint in self.endpoints}
        """Per pool: which ranks hold the KV cache of which prompts' beginnings."""
        self._draining: list[EndpointLoad] = []
        self._by_role: dict[tuple[str, Role], list[EndpointLoad]] = {}
        self.matches: dict[str, tuple[Match, ...]] = {}
        """Of the pools in which not every prefill server can be paired with every decode server."""
        self._pages: Counter[tuple[str, Role]] = Counter()
        """Read since the servers of a role were compared."""
        self._capable: dict[tuple[str, Role, Api], tuple[Sequence[EndpointLoad], float]] = {}

    @property
    def unhealthy(self) -> Sequence[EndpointLoad]:
        """Endpoints that are ejected, or have served nothing since they were."""
        generation, found = self._unhealthy
        if generation != self.generation:
            found = [host for host in self.by_url.values() if host.health.is_unhealthy]
            self._unhealthy = (self.generation, found)
        return found

    @property
    def draining(self) -> list[EndpointLoad]:
        """Endpoints that are no longer configured, or whose engine has restarted, with requests still in flight."""
        return [host for host in self._draining if host.reservations]

    def drop_idle(self) -> None:
        """Drop what is kept of draining endpoints whose last request has ended."""
        self._draining = self.draining

    def update(self, endpoints: Iterable[Endpoint], stale_after: float) -> None:
        """Take in another configuration. Whoever stays in its role keeps its books, also if its pool is named anew.

        Who is not named any more gets no request; those that it has stay on its books until they end.
        """
        self.endpoints = tuple(endpoints)
        self.stale_after = stale_after
        self.drop_idle()
        before = [*self._draining, *self.by_url.values()]
        known = {_place(host.configured): host for host in before}
        self._rename_pools(known)
        self.by_url = {}
        left = {id(host) for host in self._draining}
        for endpoint in self.endpoints:
            if (host := known.get(_place(endpoint))) is not None:
                if id(host) in left:  # what it did before it left is forgotten
                    host.health = Health(self._health, self._change)
                if host.pool != endpoint.pool:
                    self._forget_prefixes(host)
                host.configured = endpoint
                self.by_url[endpoint.url] = host
        self._draining = []
        for host in before:
            if self.by_url.get(host.url) is not host:
                self._let_go(host)
        self.failures = {each.url: self.failures[each.url] for each in self.endpoints if each.url in self.failures}
        pools = {endpoint.pool for endpoint in self.endpoints}
        self.ratios = {pool: self.ratios.get(pool) or TokenRatio() for pool in pools}
        self.prefixes = {pool: self.prefixes.get(pool) or PrefixIndex() for pool in pools}
        for pool, ratio in self.ratios.items():
            ratio.forget_all_but({each.url for each in self.endpoints if each.pool == pool})
        places = {(each.pool, each.role) for each in self.endpoints}
        self._pages = Counter({place: pages for place, pages in self._pages.items() if place in places})
        self._sort()

    def _rename_pools(self, known: dict[tuple[str, Role], EndpointLoad]) -> None:
        """Let a pool that is new go on with what is known of one that is gone, if it has servers of that one.

        A pool is called by its models, so one more of them gives it another name.
        """
        pools = {endpoint.pool for endpoint in self.endpoints}
        for endpoint in self.endpoints:
            host = known.get(_place(endpoint))
            if host is None or endpoint.pool in self.ratios or host.pool in pools:
                continue
            old, new = host.pool, endpoint.pool
            if old not in self.ratios:
                continue
            self.ratios[new], self.prefixes[new] = self.ratios.pop(old), self.prefixes.pop(old)
            for each in known.values():
                if each.pool == old:
                    each.configured = replace(each.configured, pool=new)

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Take in who an engine is. One that has become another (restarted, upgraded) starts with empty books."""
        self._change()  # the address may be another
        known = self.by_url.get(endpoint.url)
        if known is not None and replace(known.facts, reads_overrides=facts.reads_overrides) == facts:
            known.address = address
            if known.facts != facts:  # the same engine, of which more is known
                known.facts, known.capabilities = facts, capabilities(facts)
            return
        if known is not None:
            self._let_go(known)
        self.by_url[endpoint.url] = EndpointLoad(
            endpoint, address, facts, capabilities(facts), self._costs, health=Health(self._health, self._change)
        )
        self._sort()
        self._made_room()

    def _change(self) -> None:
        self.generation += 1
        self._capable.clear()

    def _let_go(self, host: EndpointLoad) -> None:
        self._forget_prefixes(host)
        self.drop_idle()
        self._draining.append(host)

    def _sort(self) -> None:
        """Find anew who takes requests, in the order of the configuration."""
        self._change()
        self._by_role = {}
        for each in self.endpoints:
            host = self.by_url.get(each.url)
            # A server in another role than configured would leave its requests hanging.
            if host is not None and host.facts.mode is MODE_OF[each.role]:
                self._by_role.setdefault((each.pool, each.role), []).append(host)
        self.matches = {}
        for pool in self.ratios:
            found = find_matches(self.known(pool, Role.PREFILL), self.known(pool, Role.DECODE))
            if found is not None:
                self.matches[pool] = found

    def known(self, pool: str, role: Role) -> Sequence[EndpointLoad]:
        """Give every host of a role that has told its facts, however well it is known."""
        return self._by_role.get((pool, role), ())

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Take in a load page that was asked for at *started*."""
        self.failures.pop(endpoint.url, None)
        host = self.by_url.get(endpoint.url)
        if host is None or host.freshness(now, self.stale_after) is not Freshness.FRESH:
            self._change()  # a further sample of a fresh endpoint changes nothing for the filters
        if host is not None:
            host.absorb(page.ranks, started, now)
            restarted = host.has_restarted(page)
            if host.is_away or restarted:
                host.is_away = False
                host.health.recovered()
            if restarted:
                self._forget_prefixes(host)
            if endpoint.role is not Role.PREFILL:
                self._compare_pace(endpoint.pool, endpoint.role)
        if endpoint.role is not Role.DECODE:
            self.ratios[endpoint.pool].counted(
                endpoint.url,
                page.prompt_tokens,
                started,
                idle=host is not None and not host.reserved_requests,
                external=host is not None and host.has_external_requests,
            )
        self._made_room()

    def _compare_pace(self, pool: str, role: Role) -> None:
        """Compare servers once for as many pages as there are servers, which costs each page the same."""
        self._pages[pool, role] += 1
        if self._pages[pool, role] >= len(peers := self._by_role.get((pool, role), ())):
            self._pages[pool, role] = 0
            compare_pace(peers)

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Take in that an endpoint could not be read. Its samples stay, and grow stale; at once if it is gone.

        What they tell of others is forgotten then, also if the endpoint goes on answering and is well known by that.
        """
        self._change()
        self.failures[endpoint.url] = failure
        host = self.by_url.get(endpoint.url)
        if host is None:
            return
        host.is_away = host.is_away or failure.is_away
        if is_gone := failure.kind in GONE:
            host.mark_stale()
            self._forget_prefixes(host)  # nobody listens, so whoever will has begun anew
        if is_gone or now - host.sampled_at > self.stale_after:
            host.forget_external(now)

    def _forget_prefixes(self, host: EndpointLoad) -> None:
        if (index := self.prefixes.get(host.pool)) is not None:  # the pool may be configured no more
            for rank in host.ranks:
                index.forget(rank)

    def eligible(self, pool: str, role: Role, now: float) -> list[EndpointLoad]:
        """Give the hosts of a role that are known best: the fresh ones; if there are none the stale ones; and so on.

        A host that is known less well is not preferred to one that is known to be loaded, but a lone one is used.

        Args:
            pool: By name.
            role: Of the hosts.
            now: Who was seen long ago is stale.
        """
        return self.best_known(self.known(pool, role), now)[1]

    def best_known(self, hosts: Sequence[EndpointLoad], now: float) -> tuple[Freshness | None, list[EndpointLoad]]:
        """Give those of some hosts that are known best, and how well they are."""
        states = [host.freshness(now, self.stale_after) for host in hosts]
        best = min(states, default=None)
        return best, [host for host, state in zip(hosts, states, strict=True) if state is best]

    def capable(self, pool: str, role: Role, api: Api, now: float) -> Sequence[EndpointLoad]:
        """Give those of the eligible hosts whose release takes the routing fields on this path.

        Nobody becomes eligible but by an observation, and nobody ceases to be but by one or by growing stale; so
        what was found holds until then.
        """
        found = self._capable.get((pool, role, api))
        if found is not None and now <= found[1]:
            return found[0]
        hosts = self.eligible(pool, role, now)
        until = min((host.seen_at + self.stale_after for host in hosts), default=now)
        capable = [host for host in hosts if host.capabilities.serves(api)]
        self._capable[pool, role, api] = (capable, until)
        return capable

    def discovered_in(self, pool: str) -> list[EndpointLoad]:
        """Give every host of a pool that has told its facts, in the order of the configuration."""
        return [host for host in self.by_url.values() if host.pool == pool]


def _place(endpoint: Endpoint) -> tuple[str, Role]:
    """Tell what must not change if an endpoint is to be the same one."""
    return endpoint.url, endpoint.role
