"""Picks an endpoint for a request that is passed as it is: any engine of a pool can answer it.

Such a request has no rank and no reservations. Of a disaggregated pool a decode endpoint gets it, as a prefill engine
with several DP ranks ends at a request that it would compute.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random

import msgspec

from dp_extproc import contract
from dp_extproc.config.pools import PoolConfig
from dp_extproc.engines.credentials import Credentials
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.request.path import Passed, refuse_disaggregated_path
from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection
from dp_extproc.request.routes import Treatment
from dp_extproc.scheduling.decision import Decision, Metadata, RequestContext
from dp_extproc.scheduling.filters import EndpointFilter, preferred
from dp_extproc.scheduling.models import ModelRegistry

_UNREACHED = Rejection(503, Reason.NO_ENDPOINTS, "no engine has been reached yet", headers=TRY_AGAIN)


class _Body(msgspec.Struct):
    model: str | None = None


class PassedRequests:
    """Picks the endpoints of passed requests."""

    def __init__(
        self, filters: EndpointFilter, credentials: Credentials, rng: Random, clock: Callable[[], float]
    ) -> None:
        self._filters = filters
        self._credentials = credentials
        self._rng = rng
        self._clock = clock
        self._pools: Sequence[PoolConfig] = ()
        self._models: ModelRegistry | None = None

    def configure(self, pools: Sequence[PoolConfig], models: ModelRegistry) -> None:
        """Pick from these pools from now on."""
        self._pools = pools
        self._models = models

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        """Pick an endpoint for a request that any engine can answer, of a subset if there is one."""
        return self._pick(self._pools, RequestContext(subset=subset))

    def pick(self, passed: Passed, body: bytes | None, context: RequestContext) -> Decision | Rejection | None:
        """Pick an endpoint for a request of a passed route.

        Args:
            passed: The route.
            body: The whole body; None if it was not read.
            context: The facts of the request besides its body.

        Returns:
            None if the body has to be read before, because its model determines the pool.
        """
        route = passed.route
        is_computed = route.treatment is Treatment.AGGREGATED
        pools = [pool for pool in self._pools if not (is_computed and pool.is_disaggregated)]
        if not pools:
            return refuse_disaggregated_path(route.path)
        if not route.by_model or len(self._pools) == 1:
            return self._pick(pools, context, by_load=is_computed)
        if body is None:
            return None
        model = _model_of(body)
        assert self._models is not None  # noqa: S101 - every scheduler is configured
        name = pools[0].name if model is None and len(pools) == 1 else self._models.pool_of(model)
        if isinstance(name, Rejection):
            return name
        chosen = [pool for pool in pools if pool.name == name]
        return self._pick(chosen, context, by_load=is_computed) if chosen else refuse_disaggregated_path(route.path)

    def _pick(
        self, pools: Iterable[PoolConfig], context: RequestContext, *, by_load: bool = False
    ) -> Decision | Rejection:
        now = self._clock()
        for pool in pools:
            role = Role.DECODE if pool.is_disaggregated else Role.WORKER
            endpoints: Sequence[EndpointLoad] = self._filters.freshest(pool.name, role, now, context.subset)
            if not endpoints:
                continue
            endpoints = preferred(endpoints, context.failed, now)[1]
            if by_load:
                least = min(each.tokens for each in endpoints)
                endpoints = [each for each in endpoints if each.tokens == least]
            address = self._rng.choice(endpoints).address
            metadata: Metadata = {contract.META_POOL: pool.name, contract.META_DECODE_HOST: address}
            headers = ((contract.DECODE_HOST, address.encode()), *self._credentials.headers(pool.name))
            return Decision(None, headers, metadata, None)
        return _UNREACHED


def _model_of(body: bytes) -> str | None:
    try:
        return msgspec.json.decode(body, type=_Body).model
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError):
        return None  # the engine refuses it, if it has to be JSON
