"""The service behind Envoys that are configured as Istio, Envoy AI Gateway and llm-d configure them for a picker."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest
import yaml

from dp_extproc.lab.engine.api.faults import Fault, Kind
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.hosted_gateways import GATEWAYS, build
from e2e.stack import FAST, body_of, one
from patience import wait_for

CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PAIR = {**CHAT, "model": "pair"}
"""A request to the pool with prefill and decode."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """Two pools behind a gateway: two aggregated engines, and a pair for prefill and decode."""

    name: str
    workers: tuple[HostedEngine, HostedEngine]
    prefill: HostedEngine
    decode: HostedEngine
    client: httpx.Client
    service: ServiceProcess


@pytest.fixture(scope="module", params=GATEWAYS)
def running(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    kind = GATEWAYS[request.param]
    with ExitStack() as running:
        engines = HostedEngines()
        workers = engines.add("--dp-size", "2", *FAST), engines.add("--dp-size", "2", *FAST)
        prefill, decode = (
            engines.add("--role", role, "--dp-attention", "--dp-size", "2", *FAST) for role in ("prefill", "decode")
        )
        running.enter_context(engines)
        pools = [
            {"models": ["*"], "workers": {"endpoints": [each.url for each in workers]}},
            {"models": ["pair"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [decode.url]}},
        ]
        listen = {"tls": {"self_signed": True}} if kind.tls else {}
        content = {**write_config(pools, listen=listen), "protocol": "endpoint_picker"}
        service = running.enter_context(ServiceProcess(content))
        service.wait_until_fresh()
        bootstrap = yaml.safe_dump(build(kind, service.config, [each.port for each in (*workers, decode)]))
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=bootstrap))
        client = running.enter_context(loopback.client(envoy.url))
        wait_for(lambda: client.post("/v1/chat/completions", json=CHAT).status_code == 200)
        yield Gateway(request.param, workers, prefill, decode, client, service)


@pytest.fixture
def gateway(running: Gateway) -> Gateway:
    for engine in (*running.workers, running.prefill, running.decode):
        engine.forget()
    return running


def test_requests_reach_the_picked_endpoint_and_rank(gateway: Gateway) -> None:
    """The gateway reads the pick from the header or from the metadata, and all endpoints and ranks are used."""
    used = set()
    for _ in range(60):
        for worker in gateway.workers:
            worker.forget()
        response = gateway.client.post("/v1/chat/completions", json=CHAT)
        request = one(gateway.workers)
        (worker,) = [each for each in gateway.workers if each.requests()]
        assert (response.status_code, response.headers["x-upstream"]) == (200, worker.url.removeprefix("http://"))
        assert body_of(request) == {"routed_dp_rank": request["rank"], **CHAT}
        used.add((worker.port, request["rank"]))
        if len(used) == 4:
            break

    assert len(used) == 4
    assert "\ndp_extproc_destination_mismatches_total 0.0\n" in gateway.service.metrics()


def test_long_streams_arrive_whole(gateway: Gateway) -> None:
    """No event is lost or repeated, whether each is a message to the service or all are one."""
    body = {"model": "any", "text": "x", "sampling_params": {"max_new_tokens": 500}, "stream": True}
    with gateway.client.stream("POST", "/generate", json=body) as response:
        lines = [line for line in response.iter_lines() if line]

    assert lines[-1] == "data: [DONE]"
    tokens = [json.loads(line.removeprefix("data: "))["meta_info"]["completion_tokens"] for line in lines[:-1]]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 500
    gateway.service.wait_until_idle()


def test_a_stream_begins_before_its_end_unless_the_gateway_buffers_it(gateway: Gateway) -> None:
    """A gateway that buffers responses sends them as they come, if it lets the service choose another mode."""
    for worker in gateway.workers:
        worker.fault(inference=Fault(Kind.SLOW, after=3, seconds=0.5))
    body = {"model": "any", "text": "x", "sampling_params": {"max_new_tokens": 20}, "stream": True}
    with gateway.client.stream("POST", "/generate", json=body) as response:
        first = next(response.iter_raw())
    for worker in gateway.workers:
        worker.server.faults.active.clear()

    assert first.startswith(b"data: ")
    assert (b"[DONE]" in first) == (gateway.name == "envoy-ai-gateway-buffered")


def test_large_bodies_arrive_whole(gateway: Gateway) -> None:
    """Bodies larger than what the gateway buffers at once arrive, where it sends them in pieces."""
    sent = {"padding": "x" * (1 << 20), **CHAT}
    assert gateway.client.post("/v1/chat/completions", json=sent).status_code == 200

    assert one(gateway.workers)["body_length"] == len(json.dumps({"routed_dp_rank": 0, **sent}, separators=(",", ":")))


def test_refusals_reach_the_client(gateway: Gateway) -> None:
    """The service answers in place of an engine, with its own status and reason."""
    response = gateway.client.post("/v1/chat/completions", json=[])

    assert (response.status_code, response.headers["x-dp-extproc-reason"]) == (400, "body_not_an_object")
    assert [each for worker in gateway.workers for each in worker.requests()] == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prefill_and_decode_meet(gateway: Gateway, *, stream: bool) -> None:
    """The gateway sends the decode leg, and the service the prefill leg with the same room."""
    response = gateway.client.post("/v1/chat/completions", json={**PAIR, "stream": stream})
    legs = one([gateway.prefill]), one([gateway.decode])

    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n") == stream
    assert [leg["outcome"] for leg in legs] == ["finished", "finished"]
    assert len({body_of(leg)["bootstrap_room"] for leg in legs}) == 1
    gateway.service.wait_until_idle()


def test_a_failed_prefill_is_an_error_for_the_client(gateway: Gateway) -> None:
    """The service answers in place of decode, which would have waited, and the gateway ends the decode leg."""
    gateway.prefill.fault(inference=Fault(Kind.INTERNAL))
    response = gateway.client.post("/v1/chat/completions", json=PAIR)
    gateway.prefill.server.faults.active.clear()

    assert (response.status_code, response.headers["x-dp-extproc-reason"]) == (502, "prefill_failed")
    assert one([gateway.decode])["outcome"] == "aborted"
    gateway.service.wait_until_idle()
