"""Requests go to the least loaded rank, and reservations show what is in flight."""

import asyncio
import base64
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import PREFILL_RANKS, Stack, run_stack
from patience import wait_for

SLOW = ("--time-scale", "0.5", "--disable-radix-cache")
"""Every prompt takes a long time to compute, also a repeated one."""
LONG = {"text": "x" * 160_000, "sampling_params": {"max_new_tokens": 400}, "stream": True}

_PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 50 * 28, 100 * 28) + bytes(120_000)
PICTURE: dict[str, Any] = {
    "type": "image_url",
    "image_url": {"url": f"data:image/png;base64,{base64.b64encode(_PNG).decode()}"},
}
"""5,000 tokens, in 160,000 characters."""


@pytest.fixture(scope="module")
def slow() -> Iterator[Stack]:
    """Give a fleet that is slow enough to be watched."""
    with run_stack(options=SLOW) as stack:
        yield stack


def reserved(stack: Stack, role: str) -> list[int]:
    """Count the reserved requests of each rank of a role."""
    (endpoint,) = [each for each in stack.service.loads()["endpoints"] if each["role"] == role]
    return [round(rank["reserved"]["requests"]) for rank in endpoint["ranks"]]


def test_reservations_follow_a_request(slow: Stack) -> None:
    """Prefill's reservation ends when its leg is answered, decode's only at the end of the stream."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(slow.client.post, "/generate", json=LONG)
        wait_for(lambda: sum(reserved(slow, "prefill")) == sum(reserved(slow, "decode")) == 1)
        wait_for(lambda: sum(reserved(slow, "prefill")) == 0)
        assert sum(reserved(slow, "decode")) == 1
        assert answer.result().status_code == 200
    wait_for(lambda: sum(reserved(slow, "decode")) == 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"input_ids": [5] * 5000}),
        ("/generate", {"text": "x" * 40, "input_ids": [5] * 5000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [PICTURE]}]}),
        ("/generate", {"text": "", "image_data": PICTURE["image_url"]["url"]}),
    ],
    ids=["ids of a chat", "ids beside a text", "picture of a chat", "picture of generate"],
)
def test_reservation_has_the_size_of_what_is_computed(slow: Stack, path: str, body: dict[str, Any]) -> None:
    """Ids replace the text, and a picture counts by its pixels, not by its base64. Decode adds 1,000 for the answer."""
    asked = {**body, "max_tokens": 400, "sampling_params": {"max_new_tokens": 400}, "stream": True}
    with slow.client.stream("POST", path, json={"messages": [{"role": "user", "content": "x"}], **asked}):
        (decode,) = [each for each in slow.service.loads()["endpoints"] if each["role"] == "decode"]
        assert sum(rank["reserved"]["tokens"] for rank in decode["ranks"]) == pytest.approx(6000, abs=100)
    wait_for(lambda: sum(reserved(slow, "prefill")) == sum(reserved(slow, "decode")) == 0)


def test_concurrent_requests_take_different_ranks(slow: Stack) -> None:
    """Concurrent requests of one size spread over all prefill ranks before any load sample could show them."""
    slow.forget()
    sent = {"text": "x" * 40_000, "sampling_params": {"max_new_tokens": 1}}

    async def send_all() -> list[int]:
        async with httpx.AsyncClient(base_url=slow.envoy.url, timeout=30, trust_env=False) as client:
            answers = [client.post("/generate", json=sent) for _ in range(2 * PREFILL_RANKS)]
            return [answer.status_code for answer in await asyncio.gather(*answers)]

    assert asyncio.run(send_all()) == [200] * 2 * PREFILL_RANKS
    ranks = Counter(request["rank"] for request in slow.prefills[0].requests())
    assert ranks == dict.fromkeys(range(PREFILL_RANKS), 2)
    wait_for(lambda: sum(reserved(slow, "prefill")) == sum(reserved(slow, "decode")) == 0)


def test_reservations_end_when_a_client_disconnects(slow: Stack) -> None:
    """A disconnect ends the reservations, and the engine notices that its client is gone."""
    slow.forget()
    with slow.client.stream("POST", "/generate", json=LONG) as response:
        next(response.iter_lines())
    wait_for(lambda: sum(reserved(slow, "prefill")) == sum(reserved(slow, "decode")) == 0)
    wait_for(lambda: all(request["outcome"] == "aborted" for request in slow.decodes[0].requests()))


def test_external_load_is_avoided() -> None:
    """A rank with direct traffic gets no request while other ranks have a lower load."""
    with EngineProcess("unified", 3, *SLOW) as engine:
        pool = {"models": ["*"], "workers": {"endpoints": [engine.url]}}
        with (
            ServiceProcess(write_config([pool])) as service,
            EnvoyProcess(service.config) as envoy,
            loopback.client() as client,
        ):
            service.wait_until_ready()
            others: dict[str, Any] = {**LONG, "text": "x" * 40_000, "routed_dp_rank": 1}
            with client.stream("POST", f"{engine.url}/generate", json=others) as response:
                lines = response.iter_lines()  # kept, because httpx disconnects when it is dropped
                next(lines)
                wait_for(lambda: service.loads()["endpoints"][0]["ranks"][1]["external_tokens"] > 5000)
                engine.forget()
                for _ in range(10):
                    sent = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
                    assert client.post(f"{envoy.url}/generate", json=sent).status_code == 200
                ranks = Counter(request["rank"] for request in engine.requests())

    assert 1 not in ranks
    assert ranks.keys() == {0, 2}
