"""A full fleet behind Envoy rejects requests, or lets them wait in the admission queue."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from e2e.stack import DECODE_RANKS, Stack, run_stack
from patience import wait_for

SLOW = ("--time-scale", "1", "--max-total-tokens", "50000")
LONG = {"text": "hello", "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
SHORT = {"text": "hello", "sampling_params": {"max_new_tokens": 1}}


def post(stack: Stack, body: dict[str, Any]) -> httpx.Response:
    return stack.client.post("/generate", json=body)


def occupy(stack: Stack, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Let each decode rank run a request, and wait until the engine has got them."""
    stack.forget()
    running = [pool.submit(post, stack, LONG) for _ in range(DECODE_RANKS)]
    wait_for(lambda: len(stack.decodes[0].requests()) == DECODE_RANKS)
    return running


@pytest.fixture(scope="module")
def full() -> Iterator[Stack]:
    """Give a decode engine whose ranks take one request each."""
    with run_stack(options=SLOW, admission={"max_requests": 1}) as stack:
        yield stack


@pytest.fixture(scope="module")
def waiting() -> Iterator[Stack]:
    """Give the same fleet with an admission queue."""
    queue = {"max_wait": "10s", "max_depth": 2}
    with run_stack(options=SLOW, admission={"max_requests": 1}, queue=queue) as stack:
        yield stack


def test_a_full_fleet_rejects_a_request_immediately(full: Stack) -> None:
    """The 429 has the reason and a time to retry; once there is room, the same request is served."""
    with ThreadPoolExecutor(8) as pool:
        running = occupy(full, pool)
        refused = post(full, SHORT)
        served = [future.result() for future in running]

    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-dp-extproc-reason"] == "over_capacity"
    assert refused.json()["error"]["code"] == "over_capacity"
    assert [answer.status_code for answer in served] == [200] * DECODE_RANKS
    assert post(full, SHORT).status_code == 200


def test_a_prompt_is_rejected_if_it_fits_on_no_rank(full: Stack) -> None:
    """The client gets a 400 before either engine receives the request."""
    full.forget()
    refused = full.client.post("/generate", json={"input_ids": [1] * 50_001})

    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "prompt_too_long"
    assert full.received() == []


def test_requests_wait_in_the_queue_if_the_fleet_is_full(waiting: Stack) -> None:
    """Of three requests, two wait and are served in the end, and one finds the queue full."""
    with ThreadPoolExecutor(8) as pool:
        running = occupy(waiting, pool)
        more = [pool.submit(post, waiting, SHORT) for _ in range(3)]
        answers = [future.result().status_code for future in running]
        outcomes = sorted(future.result().status_code for future in more)

    assert answers == [200] * DECODE_RANKS
    assert outcomes == [200, 200, 429]


def test_a_client_leaves_the_queue_when_it_disconnects(waiting: Stack) -> None:
    """A client that stops waiting is removed from the queue, and its request never reaches an engine."""
    with ThreadPoolExecutor(8) as pool:
        running = occupy(waiting, pool)
        for _ in range(3):  # more than the queue holds
            with pytest.raises(httpx.ReadTimeout):
                waiting.client.post("/generate", json=SHORT, timeout=0.2)
        served = post(waiting, SHORT)
        answers = [future.result().status_code for future in running]
        received = waiting.decodes[0].requests()

    assert answers == [200] * DECODE_RANKS
    assert served.status_code == 200
    assert len(received) == DECODE_RANKS + 1
