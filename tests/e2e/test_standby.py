"""Of several services the first that is ready decides, with all reservations in one process."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST
from patience import wait_for

REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


@dataclass(frozen=True)
class Services:
    """Two services over the same engines, and Envoy in front of both."""

    first: ServiceProcess
    standby: ServiceProcess
    client: httpx.Client

    def statuses(self, count: int) -> list[int]:
        return [self.client.post("/generate", json=REQUEST).status_code for _ in range(count)]


def routed(service: ServiceProcess) -> int:
    found = re.search(r'dp_extproc_requests_total{outcome="routed"} ([\d.]+)', service.metrics())
    return int(float(found[1])) if found else 0


@pytest.fixture
def services() -> Iterator[Services]:
    with ExitStack() as running:
        engines = [EngineProcess(role, 2, "--dp-attention", *FAST) for role in ("prefill", "decode")]
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
        standby = running.enter_context(ServiceProcess(write_config([pool])))
        envoy = {"standby": [str(standby.config.listen.grpc)]}
        first = running.enter_context(ServiceProcess(write_config([pool], envoy=envoy)))
        for service in (first, standby):
            service.wait_until_fresh()
            service.wait_until_ready()
        front = running.enter_context(EnvoyProcess(first.config))
        yield Services(first, standby, running.enter_context(loopback.client(front.url, timeout=60)))


def test_the_standby_decides_when_the_first_service_is_killed(services: Services) -> None:
    """While the first service is ready it gets every request; when it is killed, the standby gets them all."""
    before = services.statuses(20)
    shares = routed(services.first), routed(services.standby)
    services.first.stop()
    wait_for(lambda: services.statuses(1) == [200])
    after = services.statuses(20)

    assert before == after == [200] * 20
    assert shares == (20, 0)
    assert routed(services.standby) >= 21
