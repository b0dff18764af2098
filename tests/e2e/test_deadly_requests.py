"""A request that ends the engines which compute it ends two of them, and no more."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST, pool_of
from patience import wait_for

VOCABULARY = 1000
DEADLY = {"model": "m", "prompt": [5, VOCABULARY], "max_tokens": 1}
"""A request with a token id that the model does not have."""
DUPLEX = {"envoy": {"body_mode": "full_duplex_streamed"}}
HARMLESS = {"model": "m", "prompt": [5, 6], "max_tokens": 1}


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines of one role, and what stands before them."""

    engines: Sequence[EngineProcess]
    service: ServiceProcess
    envoy: EnvoyProcess
    client: httpx.Client

    def alive(self) -> int:
        return sum(engine.is_running for engine in self.engines)


@contextmanager
def running(role: str, **sections: Any) -> Iterator[Fleet]:
    """Run three engines of a role that end with an unknown id, and a decode engine where they need one."""
    options = ("--dp-attention", *FAST)
    with ExitStack() as stack:
        engines = [EngineProcess(role, 2, *options, "--vocabulary-size", str(VOCABULARY)) for _ in range(3)]
        peers = [EngineProcess("decode", 2, *options)] if role == "prefill" else []
        for engine in (*engines, *peers):
            stack.push(engine)
            engine.start()
        for engine in (*engines, *peers):
            engine.wait_until_listening()
        endpoints = [engine.url for engine in engines]
        pool = pool_of(engines, peers) if peers else {"models": ["*"], "workers": {"endpoints": endpoints}}
        service = stack.enter_context(ServiceProcess(write_config([pool], **sections)))
        envoy = stack.enter_context(EnvoyProcess(service.config))
        client = stack.enter_context(loopback.client(envoy.url, timeout=20))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Fleet(engines, service, envoy, client)


@pytest.mark.parametrize(
    ("role", "sections"),
    [
        pytest.param("prefill", {"listen": {"workers": 2}}, id="mirrored"),
        pytest.param("prefill", {"prefill_leg": "service"}, id="sent"),
        pytest.param("unified", {}, id="aggregated"),
        pytest.param("unified", DUPLEX, id="aggregated in duplex"),
    ],
)
def test_deadly_request_ends_two_engines_and_no_more(role: str, sections: dict[str, Any]) -> None:
    """The official client sends it again by itself, and raises an error that it does not retry."""
    with running(role, **sections) as fleet:
        with (
            # Until each process has seen that both engines refuse connections, the request gets a 503 that is retried.
            openai.OpenAI(base_url=f"{fleet.envoy.url}/v1", api_key="none", max_retries=10) as client,
            pytest.raises(openai.UnprocessableEntityError, match="two servers have died") as caught,
        ):
            client.completions.create(model="m", prompt=[5, VOCABULARY], max_tokens=1)

        def is_refused(stream: bool) -> bool:
            return fleet.client.post("/v1/completions", json=DEADLY | {"stream": stream}).status_code == 422

        wait_for(partial(is_refused, False))
        wait_for(partial(is_refused, True))
        served = fleet.client.post("/v1/completions", json=HARMLESS)

        assert caught.value.code == "deadly_request"
        assert served.status_code == 200
        wait_for(lambda: fleet.alive() == 1)
        found = wait_for(lambda: [line for line in fleet.service.log().splitlines() if "has ended the engines" in line])
        assert re.search(r"hash of it: [0-9a-f]{32}, its body: [0-9]+ bytes", found[0])
        assert str(VOCABULARY) not in found[0].partition("hash")[2]
        assert "dp_extproc_deadly_requests_total" in fleet.service.metrics()
