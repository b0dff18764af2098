"""Whether the service can do its job, told in the two ways that Envoy's users ask: gRPC health and HTTP."""

import asyncio
from collections.abc import Callable
from typing import Final

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from dp_extproc.config.pools import PoolConfig
from dp_extproc.engines.model import Role
from dp_extproc.extproc.service import SERVICE_NAME
from dp_extproc.load.cache import LoadCache

LIVENESS: Final = "liveness"
"""Names of gRPC health services that probes of the field use; ``""`` and the ext_proc service are standard."""
READINESS: Final = "readiness"
_FOLLOW_READINESS: Final = ("", READINESS, SERVICE_NAME)

_POLL_SECONDS: Final = 0.05


def can_serve(pool: PoolConfig, fleet: LoadCache, now: float) -> bool:
    """Tell whether a pool has at least one server, however well known, for each role it needs."""
    roles = (Role.PREFILL, Role.DECODE) if pool.is_disaggregated else (Role.WORKER,)
    return all(fleet.eligible(pool.name, role, now) for role in roles)


class Readiness:
    """Ready once some pool can serve; not ready any more once the service is stopping."""

    def __init__(self, health: aio.HealthServicer, can_serve_some: Callable[[], bool]) -> None:
        self._health = health
        self._can_serve_some = can_serve_some
        self._stopping = False
        self.ready = False

    async def run(self) -> None:
        """Keep the health service up to date until cancelled."""
        await self._health.set(LIVENESS, HealthCheckResponse.SERVING)
        await self._tell()
        while True:
            if self.ready != (now_ready := not self._stopping and self._can_serve_some()):
                self.ready = now_ready
                await self._tell()
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> None:
        """Report not ready from now on; liveness stays."""
        self._stopping = True
        self.ready = False
        await self._tell()

    async def _tell(self) -> None:
        status = HealthCheckResponse.SERVING if self.ready else HealthCheckResponse.NOT_SERVING
        for service in _FOLLOW_READINESS:
            await self._health.set(service, status)
