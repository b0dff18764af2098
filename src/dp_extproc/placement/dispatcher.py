"""From a request to a decision: which pool, which hosts, which ranks, which room, and the bodies that say so."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Final
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from dp_extproc.config.schema import ClientRanks, LoadSignal, PoolConfig
from dp_extproc.extproc import names
from dp_extproc.fleet.endpoint import Role
from dp_extproc.fleet.server_info import DEFAULT_BOOTSTRAP_PORT
from dp_extproc.placement.attempt import NOBODY, Attempt, AttemptObserver
from dp_extproc.placement.decision import Answer, Decision, Metadata
from dp_extproc.placement.demand import Demand
from dp_extproc.placement.fleet_load import FleetLoad
from dp_extproc.placement.ledger import Ledger
from dp_extproc.placement.load import HostLoad
from dp_extproc.placement.pair import Picker, Pins, Side
from dp_extproc.request.body import InferenceRequest, read_body, refuse_disaggregated
from dp_extproc.request.path import ONE_MODEL, Api
from dp_extproc.request.prefix import NO_PREFIX, prefix_of
from dp_extproc.request.prompt import Prompt
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.rewrite import Bootstrap, LegFields, rewrite_aggregated, rewrite_disaggregated

_ANY_MODEL: Final = "*"
_SHOWN_MODEL: Final = 200
"""Characters of a model's name in logs and messages; clients may send megabytes."""
_SESSION_KEPT: Final = 128
"""Characters of a conversation's name; more is more than any id has."""
_TRY_AGAIN: Final = (("retry-after", "1"),)


class _Pool:
    """A pool and what its policies remember."""

    def __init__(self, config: PoolConfig, signal: LoadSignal, fleet: FleetLoad, rng: Random) -> None:
        self.config = config
        self.name = config.name
        self.picker = Picker(config.policy, signal, fleet.prefixes[config.name], rng)
        self.honours_pins = config.policy.client_dp_rank is ClientRanks.HONOUR


class Dispatcher:
    """Decides. Holds no connection and reads no clock; what it knows of the fleet is in the load cache."""

    def __init__(
        self,
        pools: Iterable[PoolConfig],
        fleet: FleetLoad,
        *,
        owner: str,
        rng: Random,
        clock: Callable[[], float],
        signal: LoadSignal = LoadSignal.ESTIMATE,
        observer: AttemptObserver = NOBODY,
    ) -> None:
        """Set up.

        Args:
            pools: As configured; each model in one of them.
            fleet: The load cache.
            owner: ``IP:port`` where Envoy reaches this very process.
            rng: For ties, rooms and ids. Seeded differently in every process.
            clock: Monotonic seconds; the same that the load cache is fed with.
            signal: What the tokens of a rank are.
            observer: Told of every attempt.
        """
        self._pools = [_Pool(pool, signal, fleet, rng) for pool in pools]
        self._pool_of = {model: pool for pool in self._pools for model in pool.config.models}
        self._fleet = fleet
        self.ledger = Ledger(fleet, observer)
        self._owner = owner.encode()
        self._rng = rng
        self._clock = clock
        self.legs: dict[str, Attempt] = {}
        """Attempts whose prefill leg may still report, by the leg's token."""

    def place(self, api: Api, body: bytes, session: str | None = None) -> Decision | Rejection:
        """Decide where an inference request goes.

        Args:
            api: What the path asked for.
            body: The whole body.
            session: The client's name for the conversation.
        """
        request = read_body(api, body)
        if isinstance(request, Rejection):
            return request
        pool = self._resolve(request.model)
        if isinstance(pool, Rejection):
            return pool
        if pool.config.is_disaggregated:
            return refuse_disaggregated(request) or self._place_disaggregated(pool, request, session)
        return self._place_aggregated(pool, request, session)

    def look_up(self) -> Decision | Rejection:
        """Send a request that any engine can answer to a server that answers clients."""
        now = self._clock()
        for pool in self._pools:
            role = Role.DECODE if pool.config.is_disaggregated else Role.WORKER
            if hosts := self._fleet.eligible(pool.name, role, now):
                address = self._rng.choice(hosts).address
                metadata: Metadata = {names.META_POOL: pool.name, names.META_DECODE_HOST: address}
                return Decision(None, ((names.DECODE_HOST, address.encode()),), metadata, None)
        return Rejection(503, Reason.NO_ENDPOINTS, "no engine has been reached yet", headers=_TRY_AGAIN)

    def models(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        cards = [
            {"id": model, "object": "model", "created": 0, "owned_by": "sglang", "root": model, "parent": None}
            for model in self.known_models()
        ]
        plain = path.partition("?")[0]
        if not plain.startswith(ONE_MODEL):
            return Answer(msgspec.json.encode({"object": "list", "data": cards}))
        wanted = unquote(plain.removeprefix(ONE_MODEL))  # clients send org%2Fname
        for card in cards:
            if card["id"] == wanted:
                return Answer(msgspec.json.encode(card))
        return self._unknown_model(wanted)

    def known_models(self) -> list[str]:
        """Name every model that can be asked for: the configured ones, and what the engines of "*" pools serve."""
        known: dict[str, None] = {}
        for pool in self._pools:
            for model in pool.config.models:
                if model != _ANY_MODEL:
                    known[model] = None
                    continue
                for host in self._fleet.discovered_in(pool.name):
                    if host.facts.served_model and host.facts.served_model not in self._pool_of:
                        known[host.facts.served_model] = None
        return list(known)

    def _resolve(self, model: str | None) -> _Pool | Rejection:
        if model is None:
            if len(self._pools) == 1:
                return self._pools[0]
            message = f"several pools could be meant; name the model: {', '.join(self.known_models())}"
            return Rejection(400, Reason.MODEL_MISSING, message, param="model")
        return self._pool_of.get(model) or self._pool_of.get(_ANY_MODEL) or self._unknown_model(model)

    def _unknown_model(self, model: str) -> Rejection:
        message = f"the model {model[:_SHOWN_MODEL]!r} does not exist; known: {', '.join(self.known_models())}"
        return Rejection(404, Reason.MODEL_NOT_FOUND, message, param="model")

    def _place_aggregated(self, pool: _Pool, request: InferenceRequest, session: str | None) -> Decision | Rejection:
        now = self._clock()
        hosts = self._capable(pool, Role.WORKER, request.api, now)
        if isinstance(hosts, Rejection):
            return hosts
        demand = self._demand(pool, request, session)
        side = pool.picker.worker(hosts, demand, now, request.routed_rank_pin if pool.honours_pins else None)
        rank_key = side.host.capabilities.aggregated_rank_key(request.api)
        if rank_key is None:
            side = replace(side, rank=None)
        on_answer = partial(self._prompt_done, pool, side.host, request.prompt)
        attempt = self.ledger.open_worker(side, demand, now, on_prefill_answer=on_answer)
        body = rewrite_aggregated(request.body, rank_key, side.rank)
        headers = ((names.DECODE_HOST, side.host.address.encode()),)
        return Decision(body, headers, _metadata(pool, request, side), attempt)

    def _place_disaggregated(self, pool: _Pool, request: InferenceRequest, session: str | None) -> Decision | Rejection:
        now = self._clock()
        prefills = self._capable(pool, Role.PREFILL, request.api, now)
        if isinstance(prefills, Rejection):
            return prefills
        decodes = self._capable(pool, Role.DECODE, request.api, now)
        if isinstance(decodes, Rejection):
            return decodes
        pins = Pins(request.prefill_rank_pin, request.routed_rank_pin) if pool.honours_pins else Pins()
        demand = self._demand(pool, request, session)
        pair = pool.picker.pair(prefills, decodes, demand, now, pins)
        prefill, decode = pair.prefill, pair.decode
        batch = request.prompt.batch
        rooms = pair.draw_room(self._rng) if batch is None else [pair.draw_room(self._rng) for _ in range(batch)]
        leg = f"{self._rng.getrandbits(96):024x}"
        bodies = rewrite_disaggregated(
            request.body,
            batch,
            _bootstrap(prefill.host, rooms),
            _leg_fields(prefill, prefill.rank, f"dp{leg}p"),
            _leg_fields(decode, prefill.rank, f"dp{leg}d"),
        )
        on_answer = partial(self._prompt_done, pool, prefill.host, request.prompt)
        attempt = self.ledger.open_pair(pair, demand, now, leg=leg, on_prefill_answer=on_answer)
        self.legs[leg] = attempt
        headers = (
            (names.DECODE_HOST, decode.host.address.encode()),
            (names.PREFILL_HOST, prefill.host.address.encode()),
            (names.PREFILL_PREFIX, bodies.prefill_prefix),
            (names.PREFIX_LENGTH, b"%d" % bodies.prefix_length),
            (names.OWNER, self._owner),
            (names.LEG, leg.encode()),
        )
        metadata = _metadata(pool, request, decode)
        metadata[names.META_PREFILL_HOST] = prefill.host.address
        if prefill.rank is not None:
            metadata[names.META_PREFILL_RANK] = prefill.rank
        return Decision(bodies.decode, headers, metadata, attempt)

    def _demand(self, pool: _Pool, request: InferenceRequest, session: str | None) -> Demand:
        prompt = request.prompt
        return Demand(
            tokens=self._fleet.ratios[pool.name].estimate(prompt),
            requests=(prompt.batch or 1) * request.samples,
            prefix=prefix_of(request) if pool.config.policy.affinity.prefixes else NO_PREFIX,
            session=session[:_SESSION_KEPT] if session and pool.config.policy.affinity.sessions else None,
        )

    def _capable(self, pool: _Pool, role: Role, api: Api, now: float) -> Sequence[HostLoad] | Rejection:
        """Give the hosts of a role that can serve this path, at least one."""
        if capable := self._fleet.capable(pool.name, role, api, now):
            return capable
        hosts = self._fleet.eligible(pool.name, role, now)
        if not hosts:
            message = f"no {role} server of the pool for {pool.name} has been reached yet; try again shortly"
            return Rejection(503, Reason.NO_ENDPOINTS, message, headers=_TRY_AGAIN)
        versions = ", ".join(sorted({str(host.facts.version) for host in hosts}))
        message = f"{api.value} needs a newer SGLang than the {role} servers of this model run ({versions})"
        return Rejection(400, Reason.ENGINE_TOO_OLD, message)

    def _prompt_done(self, pool: _Pool, host: HostLoad, prompt: Prompt, status: int) -> None:
        if status < 400:
            self._fleet.ratios[pool.name].answered(host.endpoint.url, prompt)


def _bootstrap(prefill: HostLoad, rooms: int | list[int]) -> Bootstrap:
    endpoint = prefill.endpoint
    port = endpoint.bootstrap_port or prefill.facts.bootstrap_port or DEFAULT_BOOTSTRAP_PORT
    return Bootstrap(endpoint.bootstrap_host or endpoint.host, port, rooms)


def _leg_fields(side: Side, prefill_rank: int | None, request_id: str) -> LegFields:
    return LegFields(
        routed_rank=side.rank if side.routed else None,
        prefill_rank=prefill_rank if side.host.capabilities.carries_prefill_rank else None,
        request_id=request_id,
    )


def _metadata(pool: _Pool, request: InferenceRequest, decode: Side) -> Metadata:
    metadata: Metadata = {
        names.META_POOL: pool.name,
        names.META_MODEL: (request.model or "")[:_SHOWN_MODEL],
        names.META_DECODE_HOST: decode.host.address,
    }
    if decode.rank is not None:
        metadata[names.META_DECODE_RANK] = decode.rank
    return metadata
