"""Readiness of the service, as gRPC health and as a flag for HTTP.

Readiness changes only when an engine is discovered, when endpoints or settings change, or when the service stops.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from dp_extproc.config.pools import PoolConfig
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.extproc.service import SERVICE_NAME
from dp_extproc.load.cache import LoadCache

ALIVE: Final = ("liveness", "inference-extension")
"""Names of gRPC health services that do not follow readiness. By the second one, charts of the reference picker probe
both liveness and readiness, and a picker without an engine must not be restarted."""
READINESS: Final = "readiness"
"""Names of gRPC health services that common probes use; ``""`` and the ext_proc service are standard."""
_FOLLOW_READINESS: Final = ("", READINESS, SERVICE_NAME)


def can_serve(pool: PoolConfig, load: LoadCache) -> bool:
    """Return whether a pool has discovered endpoints, fresh or not, for each of its roles, and some can be paired."""
    roles = (Role.PREFILL, Role.DECODE) if pool.is_disaggregated else (Role.WORKER,)
    return all(load.known(pool.name, role) for role in roles) and load.matches.get(pool.name) != ()


class Readiness:
    """Ready once some pool can serve, until the service stops. Implements ``EngineListener``."""

    def __init__(self, health: aio.HealthServicer, can_serve_some: Callable[[], bool]) -> None:
        self._health = health
        self._can_serve_some = can_serve_some
        self._changed = asyncio.Event()
        self._stopping = False
        self.ready = False

    def review(self) -> None:
        """Determine readiness again after an event that may have changed it."""
        self._changed.set()

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Review, since the endpoint may be the first of its role."""
        self.review()

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Do nothing: load does not change readiness."""

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Do nothing: a discovered endpoint is used while there is no better one."""

    async def run(self) -> None:
        """Keep the health service up to date until cancelled."""
        for name in ALIVE:
            await self._health.set(name, HealthCheckResponse.SERVING)
        while True:
            self._changed.clear()
            self.ready = not self._stopping and self._can_serve_some()
            await self._publish()
            await self._changed.wait()

    async def stop(self) -> None:
        """Report not ready from now on; liveness stays."""
        self._stopping = True
        self.ready = False
        await self._publish()

    async def _publish(self) -> None:
        for service in _FOLLOW_READINESS:  # the service may stop while a name is being set
            status = HealthCheckResponse.SERVING if self.ready else HealthCheckResponse.NOT_SERVING
            await self._health.set(service, status)
