"""Two services over the same engines, each behind its own Envoy, share their requests by ``sync``."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import PATIENCE
from patience import wait_for
from sync.processes import RedisProcess, redis_server

RANKS = 4
SLOW = ("--time-scale", "4", *PATIENCE)
LONG = {"sampling_params": {"max_new_tokens": 400}, "stream": True}
SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


@dataclass(frozen=True)
class Replicas:
    """The running services, Envoys and engines."""

    engines: Sequence[EngineProcess]
    """Prefill, decode."""
    services: Sequence[ServiceProcess]
    fronts: Sequence[EnvoyProcess]
    redis: RedisProcess

    def in_flight(self, service: ServiceProcess) -> list[int]:
        """Count the reserved requests of a service, for each role."""
        endpoints = service.loads()["endpoints"]
        return [round(sum(rank["reserved"]["requests"] for rank in each["ranks"])) for each in endpoints]

    def both_reserve(self, count: int) -> bool:
        """Return whether both services have this many reserved requests on decode."""
        return [self.in_flight(service)[1] for service in self.services] == [count] * 2

    def connected(self) -> list[bool]:
        """List which services are connected to the bus."""
        return [service.loads()["sync"]["connected"] for service in self.services]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Give services that read load pages too rarely to learn from them, so all peer load comes from ``sync``."""
    with ExitStack() as running:
        redis = running.enter_context(redis_server(tmp_path_factory.mktemp("redis")))
        engines = [EngineProcess(role, RANKS, "--dp-attention", *SLOW) for role in ("prefill", "decode")]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engines[0].url]},
            "decode": {"endpoints": [engines[1].url]},
        }
        rarely = {"interval": "5m", "stale_after": "1h"}
        services = [
            running.enter_context(ServiceProcess(write_config([pool], load=rarely, sync={"url": redis.url})))
            for _ in range(2)
        ]
        fronts = [running.enter_context(EnvoyProcess(service.config)) for service in services]
        for service in services:
            service.wait_until_fresh()
            service.wait_until_ready()
        found = Replicas(engines, services, fronts, redis)
        wait_for(lambda: all(len(service.loads()["sync"]["peers"]) == 1 for service in services))
        yield found


def test_two_replicas_pick_different_ranks(replicas: Replicas) -> None:
    """Long requests through both services in turn end up on different ranks, of prefill and of decode."""
    with loopback.client(timeout=60) as client, ThreadPoolExecutor(RANKS) as pool:
        answers = []
        for count in range(1, RANKS + 1):
            sent = {**LONG, "text": f"{count}{'x' * 160_000}"}  # no engine has any of it in its prefix cache
            request = client.build_request("POST", f"{replicas.fronts[count % 2].url}/generate", json=sent)
            answers.append(pool.submit(client.send, request, stream=True))
            wait_for(partial(replicas.both_reserve, count))
        for answer in answers:
            answer.result().close()
        ranks = [Counter(request["rank"] for request in engine.requests()) for engine in replicas.engines]

    assert ranks == [dict.fromkeys(range(RANKS), 1)] * 2
    wait_for(lambda: [replicas.in_flight(service) for service in replicas.services] == [[0, 0]] * 2)


def test_metrics_and_loads_show_the_peer(replicas: Replicas) -> None:
    """Each service shows its peer, and that the bus works."""
    names = [service.loads()["sync"]["replica"] for service in replicas.services]
    peers = [service.loads()["sync"]["peers"][0]["replica"] for service in replicas.services]

    assert peers == names[::-1]
    page = replicas.services[0].metrics()
    assert "dp_extproc_sync_connected 1.0" in page
    assert "dp_extproc_sync_peers 1.0" in page
    assert 'dp_extproc_sync_messages_total{kind="received"}' in page
    assert 'dp_extproc_sync_anomalies_total{kind="gap"}' in page


def test_no_request_fails_while_the_bus_restarts(replicas: Replicas) -> None:
    """The bus dies and restarts under load: every request is served, and in the end no reservation is left."""

    async def send_until(done: asyncio.Event, front: EnvoyProcess, statuses: Counter[int]) -> None:
        async with httpx.AsyncClient(base_url=front.url, timeout=60, trust_env=False) as client:
            while not done.is_set():
                statuses[(await client.post("/generate", json=SHORT)).status_code] += 1

    async def reaches(connected: bool) -> None:
        await asyncio.to_thread(wait_for, lambda: replicas.connected() == [connected] * 2, 20.0)

    async def story() -> Counter[int]:
        done = asyncio.Event()
        statuses: Counter[int] = Counter()
        async with asyncio.TaskGroup() as senders:
            for front in (*replicas.fronts, *replicas.fronts):
                senders.create_task(send_until(done, front, statuses))
            replicas.redis.kill()
            await reaches(connected=False)
            lost_at = statuses[200]
            await asyncio.to_thread(wait_for, lambda: statuses[200] > lost_at + 10)
            replicas.redis.start()  # in this thread, as it ends with the one that starts it
            await reaches(connected=True)
            back_at = statuses[200]
            await asyncio.to_thread(wait_for, lambda: statuses[200] > back_at + 10)
            done.set()
        return statuses

    statuses = asyncio.run(story())

    assert statuses.keys() == {200}
    wait_for(lambda: [replicas.in_flight(service) for service in replicas.services] == [[0, 0]] * 2)
    for service in replicas.services:
        log = service.log()
        assert log.count("sync: no bus") == 1
        assert log.count("sync: the bus is back") == 1
