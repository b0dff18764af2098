"""Endpoints and policies change while requests are in flight, through real Envoy."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import PATIENCE
from patience import wait_for

SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
STREAM = {"text": "y", "sampling_params": {"max_new_tokens": 400}, "stream": True}


@dataclass
class Changing:
    """Two pairs of engines, of which the configuration lists one at first."""

    pairs: list[list[EngineProcess]]
    content: dict[str, Any]
    service: ServiceProcess
    client: httpx.Client

    def use(self, *pairs: int, **policy: str) -> None:
        """Write these pairs to the file, and wait until they are in use and ready."""
        self.content["pools"] = [pool_of([self.pairs[index] for index in pairs], **policy)]
        self.service.write(yaml.safe_dump(self.content))
        before = self.service.log().count("is in use as it is now")
        self.service.send_signal(signal.SIGHUP)
        wait_for(lambda: self.service.log().count("is in use as it is now") > before)
        self.service.wait_until_fresh()

    def served_by(self, pair: int) -> int:
        """Count the requests of a pair's decode engine."""
        return len(self.pairs[pair][1].requests())


def pool_of(pairs: list[list[EngineProcess]], **policy: str) -> dict[str, Any]:
    prefills, decodes = zip(*pairs, strict=True)
    return {
        "models": ["*"],
        "prefill": {"endpoints": [engine.url for engine in prefills]},
        "decode": {"endpoints": [engine.url for engine in decodes]},
        "policy": policy,
    }


@pytest.fixture
def changing() -> Iterator[Changing]:
    with ExitStack() as running:
        options = ("--dp-attention", "--time-scale", "1", *PATIENCE)
        pairs = [[EngineProcess(role, 2, *options) for role in ("prefill", "decode")] for _ in range(2)]
        for engine in (*pairs[0], *pairs[1]):
            running.push(engine)
            engine.start()
        for engine in (*pairs[0], *pairs[1]):
            engine.wait_until_listening()
        content = write_config([pool_of([pairs[0]])])
        service = running.enter_context(ServiceProcess(content))
        front = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        client = running.enter_context(loopback.client(front.url, timeout=60))
        yield Changing(pairs, content, service, client)
        service.wait_until_idle()


def test_a_reload_exchanges_endpoints_without_losing_a_request(changing: Changing) -> None:
    """A stream continues to its end after its endpoints are removed, and new requests go to the new ones."""
    with changing.client.stream("POST", "/generate", json=STREAM) as answer:
        lines = answer.iter_lines()
        next(lines)
        changing.use(1)
        page = changing.service.loads()
        statuses = [changing.client.post("/generate", json=SHORT).status_code for _ in range(5)]
        rest = [line for line in lines if line]

    assert [each["url"] for each in page["endpoints"]] == [engine.url for engine in changing.pairs[1]]
    assert changing.pairs[0][1].url in [each["url"] for each in page["draining"]]
    assert statuses == [200] * 5
    assert rest[-1] == "data: [DONE]"
    assert (changing.served_by(0), changing.served_by(1)) == (1, 5)
    changing.service.wait_until_idle()
    assert changing.service.loads()["draining"] == []


def test_an_endpoint_keeps_its_reservations_across_a_reload(changing: Changing) -> None:
    """A reload that adds endpoints keeps the reservations of the others."""
    with changing.client.stream("POST", "/generate", json=STREAM) as answer:
        lines = answer.iter_lines()
        next(lines)
        changing.use(0, 1)
        decode = next(each for each in changing.service.loads()["endpoints"] if each["url"] == changing.pairs[0][1].url)
        rest = [line for line in lines if line]

    assert sum(rank["reserved"]["requests"] for rank in decode["ranks"]) == 1
    assert changing.service.loads()["draining"] == []
    assert rest[-1] == "data: [DONE]"


def test_a_reload_changes_policies_immediately(changing: Changing) -> None:
    """With round robin both pairs get the same number of requests, one after the other."""
    changing.use(0, 1, host="round_robin")
    for _ in range(6):
        assert changing.client.post("/generate", json=SHORT).status_code == 200

    assert (changing.served_by(0), changing.served_by(1)) == (3, 3)


def test_no_request_fails_while_a_reload_exchanges_the_fleet(changing: Changing) -> None:
    """Under load one pair replaces the other, and then the reverse."""
    statuses: list[int] = []
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            statuses.append(changing.client.post("/generate", json=SHORT).status_code)

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    try:
        for pairs in ((0, 1), (1,), (0, 1), (0,)):
            changing.use(*pairs)
            if len(pairs) == 1:
                wait_for(partial(changing.served_by, pairs[0]))
    finally:
        over.set()
        for sender in senders:
            sender.join()

    assert set(statuses) == {200}
    assert changing.served_by(0) > 0
    assert changing.served_by(1) > 0
