"""Filters the endpoints of a role to those that a request may be scheduled on, or refuses it if none is left.

The filters, in this order:

1. Subset: the addresses that the gateway allows. It limits no prefill endpoint.
2. Freshness: the endpoints whose load is known best. One whose scheduler stands still is used only if none is fresh,
   and a stale one only if there is no other of these.
3. Capability: the engine's release reads the routing fields of the request, wherever they have to stand.
4. Retry avoidance: the endpoints of failed attempts are left out as far as there are others.
5. Health: endpoints whose engine is not ready, and ejected ones, are left out. If there are no others, those that are
   merely not ready remain; of nothing but ejected ones, the one whose ejection ends first.

Retry avoidance comes before health: an ejected endpoint may work again by now, while one of a failed attempt is known
to fail this very request.
"""

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from dp_extproc.engines.adapter import adapter_of, unavailable
from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Freshness
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection
from dp_extproc.scheduling.decision import RequestContext

Subset = frozenset[str]
"""Addresses ``IP:port``, or ``IP`` for all its ports (Gateway API Inference Extension, proposal 004)."""


class EndpointFilter:
    """Filters the endpoints of a load cache for one request at a time."""

    def __init__(self, load: LoadCache) -> None:
        self.load = load
        self._generation = load.generation
        self._capable: dict[tuple[str, Role, Api, bool], tuple[Sequence[EndpointLoad], float]] = {}
        """The results of :meth:`capable`, and until when each of them holds within a generation of the load cache."""

    def usable(
        self, pool: str, role: Role, request: InferenceRequest, context: RequestContext, now: float
    ) -> Sequence[EndpointLoad] | Rejection:
        """Return the endpoints of a role that a request may be scheduled on, at least one, or its refusal."""
        context = for_role(context, role)
        subset = context.subset
        if subset is None:
            capable = self.capable(pool, role, request.api, now, is_read=request.is_read)
        else:
            freshest = self.freshest(pool, role, now, subset)
            capable = [each for each in freshest if serves(each, request.api, is_read=request.is_read)]
        if not capable:
            return _refuse(pool, role, self.freshest(pool, role, now, subset), request, subset)
        if (avoided := context.avoided) or self.load.unhealthy:
            return preferred(capable, avoided, now)[1]
        return capable

    def freshest(self, pool: str, role: Role, now: float, subset: Subset | None = None) -> list[EndpointLoad]:
        """Return the endpoints of a role whose load is known best, of a subset if there is one."""
        return freshest(self.load, self.load.known(pool, role), now, subset)[1]

    def capable(self, pool: str, role: Role, api: Api, now: float, *, is_read: bool = True) -> Sequence[EndpointLoad]:
        """Return the freshest endpoints of a role whose release reads the routing fields of a request.

        An endpoint becomes fresh by an event only, and ceases to be so by an event or by the passing of time. So a
        result holds until the first of them grows stale, unless the load cache reports a change before.
        """
        if self._generation != self.load.generation:
            self._generation = self.load.generation
            self._capable.clear()
        key = (pool, role, api, is_read)
        if (found := self._capable.get(key)) is not None and now <= found[1]:
            return found[0]
        endpoints = self.freshest(pool, role, now)
        until = min((each.seen_at + self.load.stale_after for each in endpoints), default=now)
        capable = [each for each in endpoints if serves(each, api, is_read=is_read)]
        self._capable[key] = (capable, until)
        return capable


def read_subset(values: Iterable[str]) -> Subset:
    """Read a subset hint: addresses in items, or between commas.

    Args:
        values: The items of the hint. An empty hint allows no endpoint.
    """
    return frozenset(each for value in values for part in value.split(",") if (each := part.strip()))


def for_role(context: RequestContext, role: Role) -> RequestContext:
    """Return a context as it concerns a role.

    A subset is of the endpoints to which the gateway itself sends requests, and these are no prefill endpoints.
    """
    return replace(context, subset=None) if role is Role.PREFILL and context.subset is not None else context


def allows(subset: Subset, address: str) -> bool:
    """Return whether ``IP:port`` (IPv6 in brackets) is one of a subset."""
    ip = address.rpartition(":")[0]
    return address in subset or ip in subset or ip.strip("[]") in subset


def freshest(
    load: LoadCache, endpoints: Sequence[EndpointLoad], now: float, subset: Subset | None
) -> tuple[Freshness | None, list[EndpointLoad]]:
    """Return those of some endpoints whose load is known best, of a subset if there is one, and how well it is."""
    if subset is not None:
        endpoints = [each for each in endpoints if allows(subset, each.address)]
    return load.best_known(endpoints, now)


def serves(endpoint: EndpointLoad, api: Api, *, is_read: bool) -> bool:
    """Return whether an endpoint reads the routing fields of a request: from its body, or from headers if it has to."""
    takes = endpoint.capabilities
    return takes.serves(api) and (is_read or api in takes.overrides_on)


def preferred(
    endpoints: Sequence[EndpointLoad], failed: Sequence[frozenset[str]], now: float
) -> tuple[int, Sequence[EndpointLoad]]:
    """Avoid the endpoints of failed attempts, and of the others those that are ejected or not ready.

    Returns:
        How far failed attempts could be avoided, as :func:`avoid` returns it, and the endpoints, at least one.
    """
    level, others = avoid(endpoints, failed) if failed else (0, endpoints)
    return level, healthy(others, now)


def avoid(endpoints: Sequence[EndpointLoad], failed: Sequence[frozenset[str]]) -> tuple[int, Sequence[EndpointLoad]]:
    """Avoid the endpoints of failed attempts.

    Args:
        endpoints: At least one.
        failed: The addresses of each failed attempt, in order; at least one attempt.

    Returns:
        0 and the endpoints of no failed attempt; if there are none, 1 and those of all but the last one; else 2 and
        all endpoints.
    """
    for level, avoided in enumerate((frozenset[str]().union(*failed), failed[-1])):
        if left := [each for each in endpoints if each.address not in avoided]:
            return level, left
    return 2, endpoints


def healthy(endpoints: Sequence[EndpointLoad], now: float) -> Sequence[EndpointLoad]:
    """Return the endpoints that take a request, or else those that are not ejected, or else the next to be none."""
    left = [each for each in endpoints if each.takes(now)] or [each for each in endpoints if each.health.takes(now)]
    return left or [min(endpoints, key=lambda each: each.health.until)]


def _refuse(
    pool: str, role: Role, endpoints: Sequence[EndpointLoad], request: InferenceRequest, subset: Subset | None
) -> Rejection:
    """Refuse a request that none of the freshest endpoints of a subset, if there are any, can serve."""
    api = request.api
    if not endpoints:
        message = (
            f"no {role} server of the pool for {pool} has been reached yet; try again shortly"
            if subset is None
            else f"no server for {pool} is ready among those that the gateway allows"
        )
        return Rejection(503, Reason.NO_ENDPOINTS, message, headers=TRY_AGAIN)
    if not request.is_read:
        header_apis = {each for endpoint in endpoints for each in adapter_of(endpoint.facts.kind).header_apis}
        if api not in header_apis:
            message = f"{api.value} takes no rank from headers, and bodies are not read here; use a path that does"
            return Rejection(400, Reason.CANNOT_CARRY_ROUTING, f"{message}: {', '.join(sorted(header_apis))}")
        if not any(each.facts.reads_overrides for each in endpoints):
            message = f"no {role} server of the pool for {pool} obeys x-override-* headers"
            return Rejection(503, Reason.NO_ENDPOINTS, message, headers=TRY_AGAIN)
    return unavailable(api, role, (each.facts for each in endpoints))
