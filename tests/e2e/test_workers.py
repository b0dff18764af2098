"""Worker processes die, restart one by one, or stop, while Envoy has requests and streams for them."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from e2e.load import PATIENT, STREAMS, under_load
from e2e.stack import PATIENCE, Stack, run_stack
from patience import wait_for

LONG = {"text": "y", "sampling_params": {"max_new_tokens": 3000}, "stream": True}
"""A stream that is still open when all are."""


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    """Give a fleet behind two worker processes; decode takes some seconds for a stream."""
    options = ("--time-scale", "1", *PATIENCE)
    with run_stack(options=options, listen={"workers": 2}, drain="1500ms") as stack:
        wait_for(lambda: all(each["ready"] for each in of(stack)), PATIENT)
        wait_for(lambda: stack.envoy.healthy("extproc") == 2, PATIENT)
        yield stack


@pytest.fixture
def workers(running: Stack) -> Iterator[Stack]:
    """Give that fleet with empty journals; in the end no reservation may be left."""
    running.forget()
    yield running
    running.service.wait_until_idle()


def of(stack: Stack) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stack.service.loads()["worker_processes"]
    return found


def per_worker(stack: Stack, metric: str, role: str) -> dict[str, float]:
    """Sum a metric of the ranks of a role, by worker process."""
    found: dict[str, float] = {"0": 0.0, "1": 0.0}
    line = re.compile(rf'^{metric}{{process="(\d)",.*role="{role}".*}} (.*)$', re.MULTILINE)
    for worker, value in line.findall(stack.service.metrics()):
        found[worker] += float(value)
    return found


def test_load_is_counted_once_over_worker_processes(workers: Stack) -> None:
    """Envoy uses the worker processes in turn; each counts all requests, and schedules the next one by all of them."""

    def both_know_of(count: int) -> bool:
        return per_worker(workers, "dp_extproc_reserved_requests", "decode") == {"0": count, "1": count}

    before = per_worker(workers, "dp_extproc_picks_total", "decode")
    with ExitStack() as clients:
        for count in range(1, 5):
            clients.enter_context(workers.client.stream("POST", "/generate", json=LONG))
            wait_for(partial(both_know_of, count), PATIENT)
        ranks = sorted(request["rank"] for request in workers.decodes[0].requests())
        picks = per_worker(workers, "dp_extproc_picks_total", "decode")

    assert ranks == [0, 0, 1, 1]
    placed = {worker: count - before[worker] for worker, count in picks.items()}
    assert sum(placed.values()) == 4
    assert all(placed.values()), "Envoy has sent everything to one of them"


def is_back(stack: Stack, index: int, pid: int) -> bool:
    worker = of(stack)[index]
    return bool(worker["ready"] and worker["pid"] != pid)


def test_no_request_fails_when_a_worker_process_is_killed(workers: Stack) -> None:
    """After SIGKILL under load the other process takes new requests, streams continue, and the lost one restarts."""
    victim, restarts = of(workers)[0]["pid"], [each["restarts"] for each in of(workers)]

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: is_back(workers, 0, victim), PATIENT)

    load = under_load(workers.envoy.url, kill)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
    assert [each["restarts"] for each in of(workers)] == [restarts[0] + 1, restarts[1]]


def test_no_request_fails_when_worker_processes_restart_one_by_one(workers: Stack) -> None:
    """After SIGTERM under load each process drains and restarts in its turn, and no client gets an error."""

    def restart() -> None:
        for index in range(2):
            pid = of(workers)[index]["pid"]
            os.kill(pid, signal.SIGTERM)
            wait_for(partial(is_back, workers, index, pid), PATIENT)

    load = under_load(workers.envoy.url, restart)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
    assert workers.service.log().count("has ended with status 0; starting it again") == 2
