"""From a request to a decision: which pool, which hosts, which ranks, which room, and the bodies that say so."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Final

from msgspec.structs import replace

from dp_extproc import contract
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import ClientRanks, PoolConfig, RoutingFields
from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.health import choose
from dp_extproc.load.in_flight import NO_LISTENER, InFlightListener, nothing
from dp_extproc.load.rank import RankLoad
from dp_extproc.load.records import SESSION_KEPT, RequestCost
from dp_extproc.load.tracker import InFlightTracker
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix, prefix_of
from dp_extproc.request.body import InferenceRequest, read_body, refuse_disaggregated
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.rewrite import rewrite_aggregated
from dp_extproc.request.unread import unread_request
from dp_extproc.scheduling.admission import Admission, AdmissionQueue, is_too_long, largest_capacity
from dp_extproc.scheduling.decision import Answer, Decision, Metadata, Queued, RequestContext, SchedulingResult
from dp_extproc.scheduling.models import SHOWN_MODEL, ModelRegistry
from dp_extproc.scheduling.picker import Pair, Picker, Pins
from dp_extproc.scheduling.routing_fields import carry
from dp_extproc.scheduling.shortage import TRY_AGAIN, nobody_allowed, nobody_can, nobody_matches
from dp_extproc.scheduling.sides import Targets, matching_sides
from dp_extproc.scheduling.subset import allows

_WATCHED: Final = ((contract.WATCH, b"1"),)
_NO_CONTEXT: Final = RequestContext()
_BODIES_NEEDED: Final = Rejection(
    500,
    Reason.UNSUPPORTED_BODY_MODE,
    "the ext_proc filter must send request bodies BUFFERED or FULL_DUPLEX_STREAMED, as envoy-config prints it",
)
_DEFAULT_ADMISSION: Final = AdmissionSettings()


class _Pool:
    """A pool and what its policies remember."""

    def __init__(self, config: PoolConfig, signal: LoadSignal, fleet: LoadCache, rng: Random) -> None:
        self.config = config
        self.name = config.name
        self.picker = Picker(config.policy, signal, fleet.prefixes[config.name], rng)
        self.carries_in_headers = config.routing_fields is RoutingFields.HEADERS
        self.can_go_unread = not any(config.needs_bodies())
        self.honours_pins = config.policy.client_dp_rank is ClientRanks.HONOUR


class Scheduler:
    """Decides. Holds no connection and reads no clock; what it knows of the fleet is in the load cache."""

    def __init__(
        self,
        pools: Iterable[PoolConfig],
        fleet: LoadCache,
        *,
        owner: str,
        rng: Random,
        draw_token: Callable[[], str],
        clock: Callable[[], float],
        signal: LoadSignal = LoadSignal.ESTIMATE,
        observer: InFlightListener = NO_LISTENER,
        admission: AdmissionSettings = _DEFAULT_ADMISSION,
        queue: AdmissionQueue | None = None,
        sees_first_events: bool = False,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """Set up.

        Args:
            pools: As configured; each model in one of them.
            fleet: The load cache.
            owner: ``IP:port`` where Envoy reaches this very process.
            rng: For ties, rooms and ids. Seeded differently in every process.
            draw_token: Gives a token for a leg that nobody can guess, whatever ids clients have seen.
            clock: Monotonic seconds; the same that the load cache is fed with.
            signal: What the tokens of a rank are.
            observer: Told of every attempt.
            admission: What a rank may have on its books.
            queue: Where requests wait for room; None refuses them at once.
            sees_first_events: Whether Envoy is to show the first event of streaming answers.
            credentials: What requests to engines have to show.
        """
        self._fleet = fleet
        self.ledger = InFlightTracker(fleet, observer, made_room=nothing if queue is None else queue.notify)
        self._owner = owner.encode()
        self._rng = rng
        self._draw_token = draw_token
        self._clock = clock
        self._queue = queue
        self._sees_first_events = sees_first_events
        self._credentials = credentials
        self.configure(pools, signal, admission)

    def configure(self, pools: Iterable[PoolConfig], signal: LoadSignal, admission: AdmissionSettings) -> None:
        """Decide by another configuration from now on; the load cache has been told of it before."""
        pools = tuple(pools)
        self._pools = {pool.name: _Pool(pool, signal, self._fleet, self._rng) for pool in pools}
        self._catalogue = ModelRegistry(pools, self._fleet)
        self._admission = Admission(admission)

    def place(
        self,
        api: Api,
        body: bytes,
        context: RequestContext = _NO_CONTEXT,
    ) -> SchedulingResult:
        """Schedule an inference request.

        Args:
            api: The API that its path names.
            body: The whole body.
            context: The facts of the request besides its body.
        """
        request = read_body(api, body)
        return request if isinstance(request, Rejection) else self._schedule(request, context)

    def place_unread(self, api: Api, length: int | None, context: RequestContext = _NO_CONTEXT) -> SchedulingResult:
        """Schedule an inference request whose body does not pass through the service.

        Args:
            api: The API that its path names.
            length: Size of the body in bytes; None if the headers do not contain it.
            context: The facts of the request besides its body.
        """
        return self._schedule(unread_request(api, length), context)

    def place_queued(self, queued: Queued, context: RequestContext) -> SchedulingResult:
        """Schedule a request again that had to wait, without parsing its body again.

        Args:
            queued: The result of the try before.
            context: The facts of the request besides its body; with its ticket.
        """
        return self._schedule(queued.request, context, queued.prefix)

    def _schedule(
        self, request: InferenceRequest, context: RequestContext, prefix: Prefix | None = None
    ) -> SchedulingResult:
        pool = self._resolve(request.model) if request.is_read else self._only_pool()
        if isinstance(pool, Rejection):
            return pool
        is_disaggregated = pool.config.is_disaggregated
        if is_disaggregated and request.is_read:
            refusal = refuse_disaggregated(request, sees_answer=context.sees_answer)
            if refusal is not None:
                return refusal
        if self._queue is not None and self._queue.must_wait(pool.name, request.priority, context.ticket):
            return self._no_room(pool, request, prefix, "other requests are waiting already")
        place = self._place_disaggregated if is_disaggregated else self._place_aggregated
        return place(pool, request, context, prefix)

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        """Send a request that any engine can answer to a server that answers clients, of a subset if there is one."""
        now = self._clock()
        for pool in self._pools.values():
            role = Role.DECODE if pool.config.is_disaggregated else Role.WORKER
            if hosts := self._eligible(pool, role, now, subset):
                address = self._rng.choice(hosts).address
                metadata: Metadata = {contract.META_POOL: pool.name, contract.META_DECODE_HOST: address}
                headers = ((contract.DECODE_HOST, address.encode()), *self._credentials.headers(pool.name))
                return Decision(None, headers, metadata, None)
        return Rejection(503, Reason.NO_ENDPOINTS, "no engine has been reached yet", headers=TRY_AGAIN)

    def models(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        return self._catalogue.answer(path)

    def lost(self, address: str) -> None:
        """Take note that the server at this address has dropped a request."""
        for host in self._fleet.by_url.values():
            if host.address == address:
                host.health.failed(self._clock())

    def _resolve(self, model: str | None) -> _Pool | Rejection:
        name = self._catalogue.pool_of(model)
        return self._pools[name] if isinstance(name, str) else name

    def _only_pool(self) -> _Pool | Rejection:
        """Find the pool of requests that are not read, which do not name one."""
        pool = next(iter(self._pools.values()))
        return pool if len(self._pools) == 1 and pool.can_go_unread else _BODIES_NEEDED

    def _place_aggregated(
        self, pool: _Pool, request: InferenceRequest, context: RequestContext, prefix: Prefix | None
    ) -> SchedulingResult:
        now = self._clock()
        hosts = self._capable(pool, Role.WORKER, request, now, context)
        if isinstance(hosts, Rejection):
            return hosts
        demand = self._demand(pool, request, context, prefix)
        pin = request.routed_rank_pin if pool.honours_pins else None
        side = pool.picker.worker(hosts, demand, now, pin)
        if (too_long := self._refuse_too_long(side, hosts, request, demand)) is not None:
            return too_long
        if not self._has_room(side, demand):
            if roomy := self._roomy(hosts, demand):
                side = pool.picker.worker(roomy, demand, now, pin, wanted=self._fits(demand))
            if not self._has_room(side, demand):
                return self._refuse_for_room(pool, Role.WORKER, hosts, request, demand)
        rank_key = side.endpoint.capabilities.aggregated_rank_key(request.api)
        if not side.endpoint.capabilities.takes_rank(request.api) and len(side.endpoint.ranks) > 1:
            side = replace(side, rank=None)
        attempt = self.ledger.open(None, side, demand, now)
        body = rewrite_aggregated(request.body, rank_key, side.rank)
        in_header = side.rank if request.api in side.endpoint.capabilities.rank_header_on else None
        headers = (
            (contract.DECODE_HOST, side.endpoint.address.encode()),
            *(((contract.RANK_HEADER, b"%d" % in_header),) if in_header is not None else ()),
            *self._credentials.headers(pool.name),
        )
        side.endpoint.health.sent(now)
        return Decision(body, headers, _metadata(pool, request, side), attempt, streaming=request.stream)

    def _place_disaggregated(
        self, pool: _Pool, request: InferenceRequest, context: RequestContext, prefix: Prefix | None
    ) -> SchedulingResult:
        now = self._clock()
        sides = self._sides(pool, request, now, context)
        if isinstance(sides, Rejection):
            return sides
        demand = self._demand(pool, request, context, prefix)
        pair = self._pick_pair(pool, request, demand, now, sides)
        if not isinstance(pair, Pair):
            return pair
        prefill, decode = pair.prefill, pair.decode
        batch = request.prompt.batch
        rooms = pair.draw_room(self._rng) if batch is None else [pair.draw_room(self._rng) for _ in range(batch)]
        leg, number = self._draw_token(), f"{self._rng.getrandbits(96):024x}"
        carried = carry(request, pair, rooms, number, in_headers=pool.carries_in_headers)
        attempt = self.ledger.open(prefill, decode, demand, now, leg=leg, streaming=request.stream is not False)
        prefill.endpoint.health.sent(now)
        decode.endpoint.health.sent(now)
        headers = (
            (contract.DECODE_HOST, decode.endpoint.address.encode()),
            (contract.PREFILL_HOST, prefill.endpoint.address.encode()),
            *carried.headers,
            (contract.OWNER, self._owner),
            (contract.LEG, leg.encode()),
            *(_WATCHED if request.stream is not False and self._sees_first_events else ()),
            *self._credentials.headers(pool.name),
        )
        metadata = _metadata(pool, request, decode)
        metadata[contract.META_PREFILL_HOST] = prefill.endpoint.address
        if (prefill_rank := prefill.global_rank) is not None:
            metadata[contract.META_PREFILL_RANK] = prefill_rank
        return Decision(
            carried.body, headers, metadata, attempt, streaming=request.stream, merges_logprobs=request.wants_logprobs
        )

    def _pick_pair(
        self, pool: _Pool, request: InferenceRequest, demand: RequestCost, now: float, sides: Targets
    ) -> Pair | Rejection | Queued:
        """Pick both sides, of the ranks that have room if the best ones have none."""
        prefills, decodes = sides.prefills, sides.decodes
        pins = Pins(request.prefill_rank_pin, request.routed_rank_pin) if pool.honours_pins else Pins()
        pair = pool.picker.pair(prefills, decodes, demand, now, pins, decodes_of=sides.decodes_of)
        own = sides.match_of(pair.prefill.endpoint)  # one may be too small on one side, and the others on the other
        for side, hosts in (
            (pair.prefill, prefills), (pair.decode, decodes), (pair.prefill, own.prefills), (pair.decode, own.decodes)
        ):  # fmt: skip
            if (too_long := self._refuse_too_long(side, hosts, request, demand)) is not None:
                return too_long
        if not (self._has_room(pair.prefill, demand) and self._has_room(pair.decode, demand)):
            roomy = sides.only(lambda host: self._admission.has_room(host, None, demand.tokens, demand.requests))
            if roomy is not None:
                fits, of = self._fits(demand), roomy.decodes_of
                pair = pool.picker.pair(roomy.prefills, roomy.decodes, demand, now, pins, wanted=fits, decodes_of=of)
            # No rank of decode may have room of those that one room can lead to together with prefill's.
            for side, hosts in ((pair.prefill, prefills), (pair.decode, decodes)):
                if not self._has_room(side, demand):
                    return self._refuse_for_room(pool, side.endpoint.role, hosts, request, demand)
        return pair

    def _no_room(self, pool: _Pool, request: InferenceRequest, prefix: Prefix | None, why: str) -> Rejection | Queued:
        message = f"the servers for {pool.name} are full: {why}; try again later"
        rejection = Rejection(429, Reason.OVER_CAPACITY, message, headers=TRY_AGAIN)
        return rejection if self._queue is None else Queued(pool.name, request.priority, request, prefix, rejection)

    def _refuse_too_long(
        self, side: Target, hosts: Sequence[EndpointLoad], request: InferenceRequest, demand: RequestCost
    ) -> Rejection | None:
        """Refuse a prompt that no rank of these hosts can ever hold; its engine would let the other leg wait for it."""
        sample = side.endpoint.ranks[side.rank or 0].sample
        if sample is None or not sample.capacity_tokens or demand.tokens <= sample.capacity_tokens:
            return None
        if not request.is_read:  # it may be long for its pictures
            return None
        capacity = largest_capacity(hosts)
        if capacity is None or not is_too_long(request.prompt, demand.tokens, capacity):
            return None
        message = (
            f"the prompt has about {demand.tokens:.0f} tokens, and the largest {side.endpoint.role.value} rank "
            f"that it can go to holds {capacity}; send a shorter one"
        )
        return Rejection(400, Reason.PROMPT_TOO_LONG, message)

    def _has_room(self, side: Target, demand: RequestCost) -> bool:
        return self._admission.has_room(side.endpoint, side.rank, demand.tokens, demand.requests)

    def _fits(self, demand: RequestCost) -> Callable[[RankLoad], bool]:
        return partial(self._admission.fits, tokens=demand.tokens, requests=demand.requests)

    def _roomy(self, hosts: Sequence[EndpointLoad], demand: RequestCost) -> list[EndpointLoad]:
        return [host for host in hosts if self._admission.has_room(host, None, demand.tokens, demand.requests)]

    def _refuse_for_room(
        self, pool: _Pool, role: Role, hosts: Sequence[EndpointLoad], request: InferenceRequest, demand: RequestCost
    ) -> Rejection | Queued:
        why = f"no rank of its {len(hosts)} {role} servers takes {demand.tokens:.0f} more tokens"
        return self._no_room(pool, request, demand.prefix, why)

    def _demand(
        self, pool: _Pool, request: InferenceRequest, context: RequestContext, prefix: Prefix | None
    ) -> RequestCost:
        prompt, session = request.prompt, context.session
        if prefix is None:
            prefix = prefix_of(request) if pool.config.policy.affinity.prefixes else NO_PREFIX
        return RequestCost(
            tokens=self._fleet.ratios[pool.name].estimate(prompt),
            requests=(prompt.batch or 1) * request.samples,
            prefix=prefix,
            session=session[:SESSION_KEPT] if session and pool.config.policy.affinity.sessions else None,
            text_bytes=prompt.text_bytes,
            known_tokens=prompt.tokens,
        )

    def _sides(
        self, pool: _Pool, request: InferenceRequest, now: float, context: RequestContext
    ) -> Targets | Rejection:
        """Give what a pair may be picked from: never two servers that are known not to work together."""
        all_match = pool.name not in self._fleet.matches
        if not all_match and (sides := matching_sides(self._fleet, pool.name, request, now, context)) is not None:
            return sides
        prefills = self._capable(pool, Role.PREFILL, request, now, context)
        if isinstance(prefills, Rejection):
            return prefills
        decodes = self._capable(pool, Role.DECODE, request, now, context)
        if isinstance(decodes, Rejection):
            return decodes
        if all_match:
            return Targets(prefills, decodes)
        known = self._fleet.known(pool.name, Role.PREFILL), self._fleet.known(pool.name, Role.DECODE)
        return nobody_matches(pool.name, (prefills, decodes), known)

    def _eligible(self, pool: _Pool, role: Role, now: float, subset: frozenset[str] | None) -> Sequence[EndpointLoad]:
        """Return the endpoints of a role whose load is known best, of a subset if there is one."""
        known = self._fleet.known(pool.name, role)
        if subset is not None:
            known = [host for host in known if allows(subset, host.address)]
        return self._fleet.best_known(known, now)[1]

    def _capable(
        self, pool: _Pool, role: Role, request: InferenceRequest, now: float, context: RequestContext
    ) -> Sequence[EndpointLoad] | Rejection:
        """Give the hosts of a role that can serve this path and are well, at least one."""
        api, subset = request.api, context.subset
        hosts = () if subset is None else self._eligible(pool, role, now, subset)
        capable = (
            self._fleet.capable(pool.name, role, api, now)
            if subset is None
            else [host for host in hosts if host.capabilities.serves(api)]
        )
        if not request.is_read:
            capable = [host for host in capable if api in host.capabilities.overrides_on]
        if capable:
            if context.failed or self._fleet.unhealthy:
                return choose(capable, context.failed, now)
            return capable
        if subset is not None and not hosts:
            return nobody_allowed(pool.name)
        hosts = hosts or self._fleet.eligible(pool.name, role, now)
        return nobody_can(pool.name, role, hosts, api, is_read=request.is_read)


def _metadata(pool: _Pool, request: InferenceRequest, decode: Target) -> Metadata:
    metadata: Metadata = {
        contract.META_POOL: pool.name,
        contract.META_MODEL: (request.model or "")[:SHOWN_MODEL],
        contract.META_DECODE_HOST: decode.endpoint.address,
    }
    if (rank := decode.global_rank) is not None:
        metadata[contract.META_DECODE_RANK] = rank
    return metadata
