"""Schedules a request: finds its pool, picks its targets and bootstrap room, and encodes it for them.

The order is the same for both shapes of a pool:

1. Read the body, and find the pool of its model.
2. Refuse what cannot be served, or let it wait for the requests before it.
3. Filter the endpoints, and pick a target for each leg: of the ranks that have room, if the best ones have none.
4. Encode the request for its targets.
5. Open its reservations. Whatever fails before leaves none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Final

from msgspec.structs import replace

from dp_extproc import contract
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import ClientRanks, PoolConfig, RoutingFields
from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineWatch
from dp_extproc.engines.model import Endpoint
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.in_flight import NO_LISTENER, InFlightListener, nothing
from dp_extproc.load.matching import Match
from dp_extproc.load.records import SESSION_KEPT, RequestCost, Work
from dp_extproc.load.tracker import InFlightTracker
from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix, prefix_of
from dp_extproc.request.body import InferenceRequest, read_body, refuse_disaggregated, unread_request
from dp_extproc.request.fingerprint import fingerprint_of
from dp_extproc.request.path import Passed
from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection
from dp_extproc.request.routes import Api
from dp_extproc.scheduling.admission import Admission, AdmissionQueue, largest_capacity, least_tokens, may_ever_hold
from dp_extproc.scheduling.deadly import DeadlyRequests
from dp_extproc.scheduling.decision import Answer, Decision, Metadata, Queued, RequestContext, SchedulingResult
from dp_extproc.scheduling.encoder import LegSettings, RequestEncoder
from dp_extproc.scheduling.filters import EndpointFilter
from dp_extproc.scheduling.groups import GroupShares
from dp_extproc.scheduling.models import SHOWN_MODEL, ModelRegistry
from dp_extproc.scheduling.pairing import Pairing, find_pairing
from dp_extproc.scheduling.passing import PassedRequests
from dp_extproc.scheduling.picker import NO_PINS, Picker, Pins, Targets

_MIRRORED: Final = LegSettings()
_NO_CONTEXT: Final = RequestContext()
_BODIES_NEEDED: Final = Rejection(
    500,
    Reason.UNSUPPORTED_BODY_MODE,
    "the ext_proc filter must send request bodies BUFFERED or FULL_DUPLEX_STREAMED, as envoy-config prints it",
)
_DEFAULT_ADMISSION: Final = AdmissionSettings()


class _Pool:
    """The settings of a pool that each request needs, and the state of its policies."""

    def __init__(self, config: PoolConfig, signal: LoadSignal, load: LoadCache, rng: Random) -> None:
        self.name = config.name
        self.picker = Picker(config.policy, signal, load.prefixes[config.name], rng)
        self.is_disaggregated = config.is_disaggregated
        self.uses_headers = config.routing_fields is RoutingFields.HEADERS
        self.can_go_unread = not any(config.needs_bodies())
        self.honours_pins = config.policy.client_dp_rank is ClientRanks.HONOUR
        self.affinity = config.policy.affinity
        self.shares = GroupShares(
            config.name,
            config.groups.weights,
            load,
            rng,
            is_disaggregated=config.is_disaggregated,
            keeps_sessions=config.policy.affinity.sessions,
        )


class Scheduler:
    """Schedules the requests of one worker process by what the load cache contains, without any I/O of its own."""

    def __init__(
        self,
        pools: Iterable[PoolConfig],
        load: LoadCache,
        *,
        owner: str,
        rng: Random,
        draw_token: Callable[[], str],
        clock: Callable[[], float],
        signal: LoadSignal = LoadSignal.ESTIMATE,
        listener: InFlightListener = NO_LISTENER,
        admission: AdmissionSettings = _DEFAULT_ADMISSION,
        queue: AdmissionQueue | None = None,
        legs: LegSettings = _MIRRORED,
        credentials: Credentials = NO_CREDENTIALS,
        watch: EngineWatch | None = None,
        deadly: DeadlyRequests | None = None,
    ) -> None:
        """Set up.

        Args:
            pools: The configured pools; each model is in one of them.
            load: The load cache.
            owner: ``IP:port`` where Envoy reaches this worker process.
            rng: Source of ties, bootstrap rooms and ids. Each worker process has a seed of its own.
            draw_token: Draws an unguessable token for a prefill leg, whatever ids clients have seen.
            clock: Returns monotonic seconds; the clock of the load cache.
            signal: Which numbers are the load of a rank.
            listener: Called at each event of a request in flight.
            admission: The limits of what a rank may have in flight.
            queue: The admission queue; without one, requests that find no room are refused at once.
            legs: Who sends the legs, and who reports on them.
            credentials: The API keys of the engines, by pool.
            watch: Reads the facts of an engine anew where legs fail.
            deadly: The requests that end engines, which are refused.
        """
        self._load = load
        self.tracker = InFlightTracker(load, listener, made_room=nothing if queue is None else queue.notify)
        self._filters = EndpointFilter(load)
        self._passed = PassedRequests(self._filters, credentials, rng, clock)
        self._rng = rng
        self._clock = clock
        self._queue = queue
        self._encoder = RequestEncoder(legs, credentials, owner=owner, rng=rng, draw_token=draw_token)
        self._deadly = DeadlyRequests() if deadly is None else deadly
        self.group_requests: Counter[tuple[str, str | None]] = Counter()
        """Scheduled requests by pool and revision group, of pools with groups."""
        self._watch = watch
        self.configure(pools, signal, admission)

    def configure(self, pools: Iterable[PoolConfig], signal: LoadSignal, admission: AdmissionSettings) -> None:
        """Schedule by another configuration from now on. The load cache has to be updated before."""
        pools = tuple(pools)
        self._pools = {pool.name: _Pool(pool, signal, self._load, self._rng) for pool in pools}
        self._models = ModelRegistry(pools, self._load)
        self._passed.configure(pools, self._models)
        self._admission = Admission(admission)

    def forget_all_but(self, endpoints: Iterable[Endpoint]) -> None:
        """Forget the counts of revision groups without an endpoint. Each rollout has a group of its own."""
        groups = {(each.pool, each.group) for each in endpoints}
        self.group_requests = Counter({group: count for group, count in self.group_requests.items() if group in groups})

    def place(self, api: Api, body: bytes, context: RequestContext = _NO_CONTEXT) -> SchedulingResult:
        """Schedule an inference request by the API that its path names, and its whole body."""
        request = read_body(api, body)
        return request if isinstance(request, Rejection) else self._schedule(request, context)

    def place_unread(self, api: Api, length: int | None, context: RequestContext = _NO_CONTEXT) -> SchedulingResult:
        """Schedule an inference request whose body does not pass through the service; *length* is in bytes."""
        return self._schedule(unread_request(api, length), context)

    def place_queued(self, queued: Queued, context: RequestContext) -> SchedulingResult:
        """Schedule a request again that had to wait, without parsing its body again. Its context has its ticket."""
        return self._schedule(queued.request, context, queued.prefix)

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        """Pick an endpoint for a request that any engine can answer, of a subset if there is one."""
        return self._passed.look_up(subset)

    def pass_on(
        self, passed: Passed, body: bytes | None, context: RequestContext = _NO_CONTEXT
    ) -> Decision | Rejection | None:
        """Pick an endpoint for a request that is passed as it is; None if its body has to be read before."""
        return self._passed.pick(passed, body, context)

    def models(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        return self._models.answer(path)

    def lost(self, address: str) -> None:
        """Count a failure of the endpoints at an address, where the connection of a request was cut."""
        for endpoint in self._load.by_url.values():
            if endpoint.address == address:
                endpoint.health.failed(self._clock())
                self.suspect(endpoint.url)

    def suspect(self, url: str) -> None:
        """Have the facts of an endpoint read soon, because a leg has failed there."""
        if self._watch is not None:
            self._watch.suspect(url)

    def contradicted(self, url: str, why: str) -> None:
        """Have the facts of an endpoint read before it gets another request, if there are others."""
        if self._watch is not None:
            self._watch.contradicted(url, why)

    def engine_lost(self, fingerprint: str, address: str) -> None:
        """Note that the engine at an address has dropped a request that it had accepted.

        An engine that was removed, or has reported to be not ready, was to stop.
        """
        if any(each.address == address and each.is_ready for each in self._load.by_url.values()):
            self._deadly.lost(fingerprint, address, self._clock())

    def _schedule(
        self, request: InferenceRequest, context: RequestContext, prefix: Prefix | None = None
    ) -> SchedulingResult:
        pool = self._resolve(request.model) if request.is_read else self._only_pool()
        if isinstance(pool, Rejection):
            return pool
        if pool.is_disaggregated and request.is_read:
            refusal = refuse_disaggregated(request, sees_answer=context.sees_answer)
            if refusal is not None:
                return refusal
        fingerprint = fingerprint_of(request)
        for address in context.lost:
            self.engine_lost(fingerprint, address)
        if len(self._deadly):
            now = self._clock()
            if (refusal := self._deadly.refuse(fingerprint, now, len(request.body.text))) is not None:
                return refusal
            context = replace(context, occupied=self._deadly.occupied(fingerprint, now))
        if self._queue is not None and self._queue.must_wait(pool.name, request.priority, context.ticket):
            return self._no_room(pool, request, prefix, "other requests are waiting already")
        return self._place(pool, request, context, prefix, fingerprint)

    def _resolve(self, model: str | None) -> _Pool | Rejection:
        name = self._models.pool_of(model)
        return self._pools[name] if isinstance(name, str) else name

    def _only_pool(self) -> _Pool | Rejection:
        """Return the pool of a request whose body is not read, and so names no model."""
        pool = next(iter(self._pools.values()))
        return pool if len(self._pools) == 1 and pool.can_go_unread else _BODIES_NEEDED

    def _place(
        self,
        pool: _Pool,
        request: InferenceRequest,
        context: RequestContext,
        prefix: Prefix | None,
        fingerprint: str,
    ) -> SchedulingResult:
        """Pick the targets of a request, encode it for them, and only then open its reservations."""
        now = self._clock()
        is_grouped = pool.name in self._load.grouped
        narrowed = pool.shares.narrow(request, context, now) if is_grouped else None
        pairing = narrowed or self._find_pairing(pool, request, context, now)
        if isinstance(pairing, Rejection):
            return pairing
        cost = self._cost(pool, request, context, prefix)
        targets = self._pick(pool, request, cost, now, pairing)
        if narrowed is not None and not isinstance(targets, Targets):  # the group is full, and others may not be
            whole = self._find_pairing(pool, request, context, now)
            if isinstance(whole, Pairing):
                pairing = whole
                targets = self._pick(pool, request, cost, now, pairing)
        if not isinstance(targets, Targets):
            return targets
        prefill, decode = targets.prefill, targets.decode
        others = () if prefill is None else pairing.decodes_of(prefill.endpoint)
        encoded = self._encoder.encode(pool.name, request, targets, now, others=others, in_headers=pool.uses_headers)
        in_flight = self.tracker.open(
            prefill, decode, cost, now, leg=encoded.leg, streaming=request.stream is not False
        )
        if prefill is not None:
            prefill.endpoint.health.sent(now)
        decode.endpoint.health.sent(now)
        if len(self._deadly):
            addresses = [each.endpoint.address for each in (prefill, decode) if each is not None]
            self._deadly.placed(fingerprint, addresses, now)
        metadata = _metadata(pool, request, targets)
        if is_grouped:
            self.group_requests[pool.name, targets.group] += 1
            if targets.group is not None:
                metadata[contract.META_GROUP] = targets.group
        address = (contract.DECODE_HOST, decode.endpoint.address.encode())
        return Decision(
            encoded.body,
            (address, *encoded.headers),
            metadata,
            in_flight,
            streaming=request.stream,
            merges=None if prefill is None else request.prompt_part,
            renames=encoded.renames,
            prefill=encoded.prefill,
            abort=encoded.abort,
            client_ids=encoded.client_ids,
            legs=encoded.legs,
            fallbacks=encoded.fallbacks,
            fingerprint=fingerprint,
        )

    def _find_pairing(
        self, pool: _Pool, request: InferenceRequest, context: RequestContext, now: float
    ) -> Pairing | Rejection:
        return find_pairing(self._filters, pool.name, request, context, now, is_disaggregated=pool.is_disaggregated)

    def _pick(
        self, pool: _Pool, request: InferenceRequest, cost: RequestCost, now: float, pairing: Pairing
    ) -> Targets | Rejection | Queued:
        """Pick the targets of a request, on ranks that have room if the best ones have none."""
        pins = Pins(request.prefill_rank_pin, request.routed_rank_pin) if pool.honours_pins else NO_PINS
        targets = pool.picker.pick(pairing, cost, now, pins)
        prefill, decode = targets.prefill, targets.decode
        if not (may_ever_hold(decode, cost) and (prefill is None or may_ever_hold(prefill, cost))):
            refusal = _refuse_too_long(targets, pairing, request, cost)
            if refusal is not None:
                return refusal
        takes = self._admission.takes
        if not (takes(decode, cost) and (prefill is None or takes(prefill, cost))):
            roomy = pairing.only(partial(self._admission.has_room, cost=cost))
            if roomy is not None:
                targets = pool.picker.pick(roomy, cost, now, pins, wanted=partial(self._admission.fits, cost=cost))
            # No rank of decode may have room of those that one bootstrap room can lead to together with prefill's.
            for target, endpoints in _with_endpoints(targets, pairing):
                if not takes(target, cost):
                    role, count = target.endpoint.role, len(endpoints)
                    why = f"no rank of its {count} {role} servers takes {cost.tokens:.0f} more tokens"
                    return self._no_room(pool, request, cost.prefix, why)
        return targets if prefill is not None else _as_engine_picks(targets, request.api)

    def _no_room(self, pool: _Pool, request: InferenceRequest, prefix: Prefix | None, why: str) -> Rejection | Queued:
        message = f"the servers for {pool.name} are full: {why}; try again later"
        rejection = Rejection(429, Reason.OVER_CAPACITY, message, headers=TRY_AGAIN)
        if self._queue is None:
            return rejection
        work = Work(self._load.ratios[pool.name].estimate(request.prompt), _sequences(request))
        return Queued(pool.name, request.priority, request, prefix, rejection, work)

    def _cost(
        self, pool: _Pool, request: InferenceRequest, context: RequestContext, prefix: Prefix | None
    ) -> RequestCost:
        prompt, session = request.prompt, context.session
        if prefix is None:
            prefix = prefix_of(request) if pool.affinity.prefixes else NO_PREFIX
        return RequestCost(
            tokens=self._load.ratios[pool.name].estimate(prompt),
            requests=_sequences(request),
            prefix=prefix,
            session=session[:SESSION_KEPT] if session and pool.affinity.sessions else None,
            text_bytes=prompt.text_bytes,
            known_tokens=prompt.tokens,
            has_media=prompt.has_media,
        )


def _sequences(request: InferenceRequest) -> float:
    """Return how many sequences a request makes."""
    return (request.prompt.batch or 1) * request.samples


def _with_endpoints(targets: Targets, scope: Pairing | Match) -> Iterator[tuple[Target, Sequence[EndpointLoad]]]:
    """Yield each target with the endpoints of its role."""
    if targets.prefill is not None:
        yield targets.prefill, scope.prefills
    yield targets.decode, scope.decodes


def _refuse_too_long(
    targets: Targets, pairing: Pairing, request: InferenceRequest, cost: RequestCost
) -> Rejection | None:
    """Refuse a prompt that no rank of a role can ever hold: the other leg would wait for it in vain."""
    if not request.is_read:  # the size of a body may be that of images
        return None
    least = least_tokens(request.prompt, cost.tokens)
    # Of the endpoints that can be paired with the picked ones, all may be too small, and others not.
    for scope in pairing.scopes_of(targets.prefill):
        for target, endpoints in _with_endpoints(targets, scope):
            if not may_ever_hold(target, cost) and least > (capacity := largest_capacity(endpoints)):
                message = (
                    f"the prompt has about {cost.tokens:.0f} tokens, and the largest "
                    f"{target.endpoint.role.value} rank that it can go to holds {capacity}; send a shorter one"
                )
                return Rejection(400, Reason.PROMPT_TOO_LONG, message)
    return None


def _as_engine_picks(targets: Targets, api: Api) -> Targets:
    """Drop the rank of an aggregated endpoint whose engine takes none on this path, and so picks one itself."""
    decode = targets.decode
    if decode.endpoint.capabilities.takes_rank(api) or len(decode.endpoint.ranks) == 1:
        return targets
    return Targets(None, replace(decode, rank=None))


def _metadata(pool: _Pool, request: InferenceRequest, targets: Targets) -> Metadata:
    metadata: Metadata = {
        contract.META_POOL: pool.name,
        contract.META_MODEL: (request.model or "")[:SHOWN_MODEL],
        contract.META_DECODE_HOST: targets.decode.endpoint.address,
    }
    if (rank := targets.decode.global_rank) is not None:
        metadata[contract.META_DECODE_RANK] = rank
    if targets.prefill is not None:
        metadata[contract.META_PREFILL_HOST] = targets.prefill.endpoint.address
        if (rank := targets.prefill.global_rank) is not None:
            metadata[contract.META_PREFILL_RANK] = rank
    return metadata
