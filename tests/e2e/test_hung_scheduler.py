"""Engines whose schedulers hang while their pages answer, through real Envoy."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from e2e.stack import Stack, run_stack
from patience import wait_for

_numbers = count()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Stack]:
    """Give two engines of each role, which have served some requests."""
    with run_stack(prefills=2, decodes=2) as stack:
        assert send(stack, 8) == [200] * 8
        yield stack


def send(stack: Stack, requests: int) -> list[int]:
    """Send requests at the same time, of which no two have a common prefix. Returns their statuses."""

    def generate(number: int) -> int:
        body = {"text": f"{number:09} " * 400, "sampling_params": {"max_new_tokens": 40}}
        return stack.client.post("/generate", json=body).status_code

    with ThreadPoolExecutor(requests) as threads:
        return list(threads.map(generate, islice(_numbers, requests)))


def state(stack: Stack, engine: EngineProcess) -> str:
    shown = next(each for each in stack.service.loads()["endpoints"] if each["url"] == engine.url)
    return f"{shown['state']} {shown['endpoint_state']}"


def test_hung_schedulers_are_avoided_until_they_go_on(fleet: Stack) -> None:
    """One of each role hangs with requests; the next ones go to the others, and those that waited are served later."""
    hung, well = (fleet.prefills[0], fleet.decodes[0]), (fleet.prefills[1], fleet.decodes[1])
    for engine in hung:
        engine.fault(scheduler="hang")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(send, fleet, 12)
        wait_for(lambda: [state(fleet, engine) for engine in hung] == ["suspect suspect"] * 2, 30.0)
        fleet.forget()
        assert send(fleet, 12) == [200] * 12
        received = [[len(engine.requests()) for engine in engines] for engines in (hung, well)]
        states = [state(fleet, engine) for engine in well]
        metrics, log = fleet.service.metrics(), fleet.service.log()
        for engine in hung:
            engine.heal()
        assert waiting.result(60) == [200] * 12

    assert received == [[0, 0], [12, 12]]
    assert states == ["fresh ready"] * 2
    for engine in hung:
        assert f'endpoint="{engine.url}",pool="*",role="{engine.role}",state="suspect"}} 1.0' in metrics
        assert f"{engine.url}: its load page answers, but its scheduler stands still" in log
    wait_for(lambda: [state(fleet, engine) for engine in hung] == ["fresh ready"] * 2)
    assert all(f"{engine.url}: its scheduler goes on" in fleet.service.log() for engine in hung)
    assert "dp_extproc_leg_failures_total{" not in fleet.service.metrics()
