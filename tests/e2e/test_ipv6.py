"""Engines with IPv6 addresses work, although releases differ in how they read one."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import DECODE_RANKS, FAST, PREFILL_RANKS, Stack, body_of
from ipv6 import needs_ipv6

pytestmark = needs_ipv6

CHAT = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


@pytest.fixture(scope="module", params=["0.5.7", "0.5.9", "0.5.10", "0.5.23"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Run a pair of one release on ::1; the bootstrap host of prefill is the address in its URL."""
    version = str(request.param)
    flags = ("--sglang-version", version, "--dp-attention", *FAST)
    with ExitStack() as running:
        prefill = running.enter_context(EngineProcess("prefill", PREFILL_RANKS, *flags, host="::1"))
        decode = running.enter_context(EngineProcess("decode", DECODE_RANKS, *flags, host="::1"))
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [prefill.url]},
            "decode": {"endpoints": [{"url": decode.url}]},
        }
        service = running.enter_context(ServiceProcess(write_config([pool])))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url, timeout=60))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Stack([prefill], [decode], service, envoy, client, tuple(map(int, version.split("."))))
        service.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_both_legs_meet_at_ipv6_addresses(stack: Stack, stream: bool) -> None:
    """Envoy reaches both engines, and decode reaches prefill's bootstrap port, however the release reads brackets."""
    stack.forget()
    answer = stack.client.post("/v1/chat/completions", json={**CHAT, "stream": stream})

    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n") if stream else json.loads(answer.text)["choices"]
    for leg in stack.legs():
        assert leg["outcome"] == "finished"
        assert body_of(leg)["bootstrap_host"] == "[::1]"


def test_a_lookup_reaches_an_engine_at_an_ipv6_address(stack: Stack) -> None:
    """The request reaches the decode engine at its address in brackets."""
    assert stack.client.get("/get_model_info").status_code == 200
