"""With two replicas of two worker processes over one fleet, the process that schedules a request watches its legs.

Envoy mirrors the prefill legs of one replica, and the other sends its own, as while a deployment is changed.
"""

import re
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import PATIENCE
from patience import wait_for
from sync.processes import redis_server

RANKS, CLIENTS, REQUESTS = 2, 16, 120
FLAGS = ("--time-scale", "0.1", "--dp-attention", *PATIENCE)
PLAIN = {"text": "hello", "sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
STREAM = {**PLAIN, "stream": True}


@dataclass(frozen=True)
class Many:
    """The running replicas, Envoys and engines."""

    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    services: Sequence[ServiceProcess]
    fronts: Sequence[EnvoyProcess]

    def counts(self, metric: str) -> list[float]:
        """List a metric of every process."""
        line = re.compile(rf"^{metric} (.*)$", re.MULTILINE)
        return [float(value) for service in self.services for value in line.findall(service.metrics())]

    def ask(self, number: int) -> tuple[int, bytes]:
        """Send a request through the Envoys in turn, streaming or not, over a connection of its own."""
        url = f"{self.fronts[number % 2].url}/generate"
        answer = httpx.post(url, json=STREAM if number % 4 < 2 else PLAIN, timeout=60, trust_env=False)
        return answer.status_code, answer.content


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    with ExitStack() as running:
        redis = running.enter_context(redis_server(tmp_path_factory.mktemp("redis")))
        prefills, decodes = (
            [running.enter_context(EngineProcess(role, RANKS, *FLAGS)) for _ in range(2)]
            for role in ("prefill", "decode")
        )
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in prefills]},
            "decode": {"endpoints": [engine.url for engine in decodes]},
        }
        services = [
            running.enter_context(
                ServiceProcess(
                    {**write_config([pool], listen={"workers": 2}, sync={"url": redis.url}), "prefill_leg": leg}
                )
            )
            for leg in ("envoy", "service")
        ]
        for service in services:
            service.wait_until_fresh()
            service.wait_until_ready()
        fronts = [running.enter_context(EnvoyProcess(service.config)) for service in services]
        yield Many(prefills, decodes, services, fronts)


def all_at_once(many: Many) -> list[tuple[int, bytes]]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(many.ask, range(REQUESTS)))


def test_every_leg_reports_to_the_process_that_scheduled_it(many: Many) -> None:
    """All four processes schedule requests, and none misses a leg."""
    answers = all_at_once(many)
    for service in many.services:
        service.wait_until_idle()

    assert {status for status, _ in answers} == {200}
    routed = many.counts('dp_extproc_requests_total{.*outcome="routed".*}')
    assert len(routed) == 4
    assert min(routed) > 0
    assert sum(many.counts("dp_extproc_missing_prefill_legs_total{.*}")) == 0


def test_requests_are_retried_when_a_prefill_engine_dies_under_load(many: Many) -> None:
    """The process that scheduled a request on the dead engine retries it, and no client gets an error."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(many.ask, number) for number in range(REQUESTS)]
        wait_for(lambda: sum(answer.done() for answer in answers) > REQUESTS // 4)
        many.prefills[0].stop(signal.SIGKILL)
        found = [answer.result() for answer in answers]
    for service in many.services:
        service.wait_until_idle()

    assert [status for status, _ in found] == [200] * REQUESTS
    assert not any(b'"abort"' in content for _, content in found)
