"""The shipped gateway handles more requests in flight than Envoy allows by default."""

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import yaml

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import load_gateway
from e2e.stack import FAST
from patience import wait_for

STREAMS = 1100
"""More than Envoy's default limit of its circuit breakers, which is 1024."""
DESCRIPTORS = 8 * 1024
"""More file descriptors than Envoy, an engine or this test need."""
BODY = json.dumps({"text": "x", "sampling_params": {"max_new_tokens": 1}}).encode()
REQUEST = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(BODY),
    BODY,
)


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Let processes that start meanwhile open that many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def ask(host: str, port: int) -> bytes:
    """Send a request, and return the text of its response."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(REQUEST)
        return await reader.read(1000)
    finally:
        writer.close()


def test_more_than_1024_requests_are_answered_although_the_service_stops() -> None:
    """All requests are at the engines at the same time; then the service stops, and then the engines answer."""
    with ExitStack() as running:
        workers = [running.enter_context(EngineProcess("unified", 2, *FAST)) for _ in range(2)]
        pool = {"models": ["*"], "workers": {"endpoints": [each.url for each in workers]}}
        content = write_config(
            [pool], admission={"max_request_ratio": 1000, "max_token_ratio": 1000}, load={"stale_after": "60s"}
        )
        service = running.enter_context(ServiceProcess({**content, "protocol": "endpoint_picker"}))
        gateway = yaml.safe_dump(load_gateway(service.config, [each.port for each in workers]))
        running.enter_context(EnvoyProcess(service.config, bootstrap=gateway))
        service.wait_until_fresh()
        for worker in workers:
            worker.fault(inference={"kind": "slow", "seconds": 600})  # or until the fault is removed
        address = service.config.envoy.inference

        async def story() -> list[bytes]:
            asked = [asyncio.create_task(ask(address.host, address.port)) for _ in range(STREAMS)]

            def have_arrived() -> bool:
                is_marked_incomplete = any(task.done() for task in asked)
                return is_marked_incomplete or sum(len(each.requests()) for each in workers) == STREAMS

            await asyncio.to_thread(wait_for, have_arrived, 120.0)
            assert [task.result() for task in asked if task.done()] == []
            assert await asyncio.to_thread(service.stop) == 0
            for worker in workers:
                worker.heal()
            return await asyncio.gather(*asked)

        answers = asyncio.run(story())

    assert Counter(answer.partition(b"\r\n")[0] for answer in answers) == {b"HTTP/1.1 200 OK": STREAMS}
