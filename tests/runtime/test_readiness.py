"""Readiness as gRPC health probes see it, with a real client and a real port."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import LoadPage, Role
from dp_extproc.extproc.service import SERVICE_NAME
from dp_extproc.load.cache import LoadCache
from dp_extproc.runtime.readiness import ALIVE, READINESS, Readiness, can_serve
from fleet_fixtures import Fleet, address_of, make_endpoint, make_facts

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
FOLLOWING = ["", READINESS, SERVICE_NAME]


class Probe:
    """A service whose readiness can be set, and a client that asks for it."""

    def __init__(self) -> None:
        self.can_serve = False
        health = aio.HealthServicer()
        self.readiness = Readiness(health, lambda: self.can_serve)
        self.server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def run(self, scenario: Callable[["Probe"], Awaitable[None]]) -> None:
        await self.server.start()
        task = asyncio.create_task(self.readiness.run())
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel, asyncio.timeout(20):
                self.stub = health_pb2_grpc.HealthStub(channel)
                await scenario(self)
        finally:
            task.cancel()
            await self.server.stop(None)

    async def status(self, service: str) -> int:
        return int((await self.stub.Check(HealthCheckRequest(service=service))).status)

    async def wait_for(self, status: int) -> None:
        """Wait, as a probe that watches, until the whole service has a status."""
        watch = self.stub.Watch(HealthCheckRequest(service=SERVICE_NAME))
        async for response in watch:
            if response.status == status:
                break
        watch.cancel()


def test_every_name_but_liveness_follows_readiness() -> None:
    """Not ready, ready, stopping: every name follows, and liveness stays."""

    async def scenario(probe: Probe) -> None:
        await probe.wait_for(NOT_SERVING)
        assert [await probe.status(name) for name in FOLLOWING] == [NOT_SERVING] * 3
        assert [await probe.status(name) for name in ALIVE] == [SERVING, SERVING]
        probe.can_serve = True
        probe.readiness.review()
        await probe.wait_for(SERVING)
        assert [await probe.status(name) for name in FOLLOWING] == [SERVING] * 3
        await probe.readiness.stop()
        assert [await probe.status(name) for name in FOLLOWING] == [NOT_SERVING] * 3
        assert [await probe.status(name) for name in ALIVE] == [SERVING, SERVING]

    async def start() -> None:
        await Probe().run(scenario)

    asyncio.run(start())


def test_discovery_reviews_readiness() -> None:
    """The endpoint may be the first of its role; load and failures of an endpoint change nothing."""

    async def scenario(probe: Probe) -> None:
        await probe.wait_for(NOT_SERVING)
        probe.can_serve = True
        endpoint = make_endpoint(Role.WORKER)
        probe.readiness.failed(endpoint, EngineFailure(FailureKind.TIMEOUT, "slow"), 0.0)
        probe.readiness.sampled(endpoint, LoadPage(()), 0.0, 0.0)
        assert await probe.status(READINESS) == NOT_SERVING
        probe.readiness.discovered(endpoint, address_of(endpoint), make_facts(Role.WORKER), 0.0)
        await probe.wait_for(SERVING)

    async def start() -> None:
        await Probe().run(scenario)

    asyncio.run(start())


def test_readiness_counts_discovered_endpoints_of_every_role() -> None:
    """A pool needs all its roles, and its load may be unknown."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)], sampled=False)
    half = LoadCache(fleet.endpoints, 5.0)
    half.discovered(fleet.endpoints[0], address_of(fleet.endpoints[0]), make_facts(Role.PREFILL), 0.0)

    assert can_serve(fleet.pool, fleet.load)
    assert not can_serve(fleet.pool, half)


def test_readiness_needs_endpoints_that_can_be_paired() -> None:
    """Prefill of one revision and decode of another serve no request."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)] * 2)
    prefill, *decodes = fleet.endpoints

    def can_serve_with(*groups: str) -> bool:
        grouped = [replace(each, group=group) for each, group in zip(decodes, groups, strict=False)]
        fleet.load.update([replace(prefill, group="v1"), *grouped], 5.0)
        return can_serve(fleet.pool, fleet.load)

    assert not can_serve_with("v2", "v3")
    assert can_serve_with("v2", "v1")
    assert not can_serve_with("v2")


def test_unknown_name_is_not_found() -> None:
    """A misspelt probe fails at once."""

    async def scenario(probe: Probe) -> None:
        await probe.wait_for(NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await probe.status("rediness")
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND

    async def start() -> None:
        await Probe().run(scenario)

    asyncio.run(start())
