"""Behind a gateway that fails closed, requests at engines are answered in full when the service restarts."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc, load_gateway
from e2e.stack import PATIENCE
from patience import wait_for

TOKENS = 300
"""Tokens of each response; a stream has an event for each."""
EACH = 4
"""Requests of each kind."""


@dataclass(frozen=True)
class Gateway:
    """One aggregated engine behind a gateway."""

    worker: EngineProcess
    service: ServiceProcess
    envoy: EnvoyProcess


@contextmanager
def run_gateway(**processing_mode: str) -> Iterator[Gateway]:
    with ExitStack() as running:
        worker = running.enter_context(EngineProcess("unified", 2, "--time-scale", "1", *PATIENCE))
        pool = {"models": ["*"], "workers": {"endpoints": [worker.url]}}
        service = running.enter_context(ServiceProcess({**write_config([pool]), "protocol": "endpoint_picker"}))
        gateway = load_gateway(service.config, [worker.port, worker.port])
        ext_proc(gateway)["processing_mode"].update(processing_mode)
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=yaml.safe_dump(gateway)))
        service.wait_until_fresh()
        yield Gateway(worker, service, envoy)


async def ask(client: httpx.AsyncClient, begun: asyncio.Semaphore, *, stream: bool) -> str:
    """Send a request, and return its result."""
    body = {"text": "x", "sampling_params": {"max_new_tokens": TOKENS}, "stream": stream}
    text = ""
    async with client.stream("POST", "/generate", json=body) as answer:
        try:
            async for piece in answer.aiter_text():
                if not text and stream:
                    begun.release()
                text += piece
        except httpx.TransportError as error:
            return f"{len(text)} bytes, then {error!r}"
    end = "data: [DONE]\n\n" if stream else "}"
    is_whole = text.endswith(end) and text.count("data: ") == (TOKENS + 1 if stream else 0)
    return "whole" if answer.status_code == 200 and is_whole else f"{answer.status_code}: {text[-100:]!r}"


def ask_during(gateway: Gateway, happen: Callable[[], Awaitable[Any]]) -> dict[bool, list[str]]:
    """Send requests, stop the engine in the middle of all of them, call *happen*, and let the engine continue.

    Returns:
        The results of the streams, which had begun, and of whole responses, which had not.
    """

    async def story() -> dict[bool, list[str]]:
        begun = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=gateway.envoy.url, timeout=60, trust_env=False, limits=limits) as client,
            asyncio.TaskGroup() as clients,
        ):
            asked = {
                stream: [clients.create_task(ask(client, begun, stream=stream)) for _ in range(EACH)]
                for stream in (False, True)
            }
            for _ in range(EACH):
                await begun.acquire()
            await asyncio.to_thread(wait_for, lambda: len(gateway.worker.requests()) == 2 * EACH)
            gateway.worker.send_signal(signal.SIGSTOP)
            try:
                assert not any(task.done() for tasks in asked.values() for task in tasks)
                await happen()
            finally:
                gateway.worker.send_signal(signal.SIGCONT)
        return {stream: [task.result() for task in tasks] for stream, tasks in asked.items()}

    return asyncio.run(story())


@pytest.mark.parametrize("request_body_mode", ["FULL_DUPLEX_STREAMED", "BUFFERED"])
def test_requests_at_engines_are_answered_in_full_when_the_service_stops(request_body_mode: str) -> None:
    """The service ends these streams with status OK; a broken one would be an empty 500 or a cut response."""
    statuses: list[int | None] = []

    with run_gateway(request_body_mode=request_body_mode) as gateway:

        async def stop() -> None:
            statuses.append(await asyncio.to_thread(gateway.service.stop))

        answers = ask_during(gateway, stop)

    assert statuses == [0]
    assert answers == {False: ["whole"] * EACH, True: ["whole"] * EACH}
