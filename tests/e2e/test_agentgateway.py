"""The service behind a gateway that calls it as agentgateway does."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dp_extproc.lab.engine.api.faults import Fault, Kind
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.agentgateway import AgentGateway
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST, body_of, one

PAIR = {"model": "pair", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
"""A request to the pool with prefill and decode."""
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[HostedEngine, ...]]:
    """Two aggregated engines, and a pair for prefill and decode."""
    hosted = HostedEngines()
    workers = [hosted.add("--dp-size", "2", *FAST) for _ in range(2)]
    pair = [hosted.add("--role", role, "--dp-attention", "--dp-size", "2", *FAST) for role in ("prefill", "decode")]
    with hosted:
        yield (*workers, *pair)


@pytest.fixture(scope="module")
def service(engines: tuple[HostedEngine, ...]) -> Iterator[ServiceProcess]:
    first, second, prefill, decode = (each.url for each in engines)
    pools = [
        {"models": ["*"], "workers": {"endpoints": [first, second]}},
        {"models": ["pair"], "prefill": {"endpoints": [prefill]}, "decode": {"endpoints": [decode]}},
    ]
    with ExitStack() as running:
        service = running.enter_context(ServiceProcess({**write_config(pools), "protocol": "endpoint_picker"}))
        service.wait_until_fresh()
        yield service


@pytest.fixture
def gateway(service: ServiceProcess, engines: tuple[HostedEngine, ...]) -> AgentGateway:
    for each in engines:
        each.forget()
    endpoints = {each.url.removeprefix("http://") for each in engines if each is not engines[2]}
    return AgentGateway(str(service.config.listen.grpc), endpoints)


@pytest.fixture
def workers(engines: tuple[HostedEngine, ...]) -> tuple[HostedEngine, ...]:
    return engines[:2]


def test_a_request_reaches_the_picked_endpoint_and_rank(
    gateway: AgentGateway, workers: tuple[HostedEngine, ...], service: ServiceProcess
) -> None:
    """Header and body arrive as the service wrote them, and what served is no mismatch."""
    response = asyncio.run(gateway.post("/v1/chat/completions", json.dumps(CHAT).encode()))
    request = one(workers)

    assert (response.status, json.loads(response.body)["choices"][0]["finish_reason"]) == (200, "length")
    assert body_of(request) == {"routed_dp_rank": request["rank"], **CHAT}
    assert request["headers"]["x-gateway-destination-endpoint"] == response.served
    service.wait_until_idle()
    assert "\ndp_extproc_destination_mismatches_total 0.0\n" in service.metrics()


def test_a_stream_and_a_large_body_arrive_whole(
    gateway: AgentGateway, workers: tuple[HostedEngine, ...], service: ServiceProcess
) -> None:
    """The body comes in many pieces before the first reply, and each event of the response is a message."""
    body = {"model": "any", "text": "x" * 300_000, "sampling_params": {"max_new_tokens": 200}, "stream": True}
    response = asyncio.run(gateway.post("/generate", json.dumps(body).encode()))
    lines = [line for line in response.body.split(b"\n\n") if line]

    assert (len(lines), lines[-1]) == (201, b"data: [DONE]")
    assert one(workers)["body_length"] > 300_000
    assert gateway.sent_messages > 100
    service.wait_until_idle()


def test_a_refusal_takes_the_place_of_the_response(gateway: AgentGateway, workers: tuple[HostedEngine, ...]) -> None:
    """No engine gets the request."""
    response = asyncio.run(gateway.post("/v1/chat/completions", b"[]"))

    assert (response.status, response.headers["x-dp-extproc-reason"]) == (400, "body_not_an_object")
    assert [each for worker in workers for each in worker.requests()] == []


def test_metrics_have_the_names_of_reference_pickers(gateway: AgentGateway, service: ServiceProcess) -> None:
    """Idle engines have no queue; the label is the name of the pool."""
    asyncio.run(gateway.post("/v1/chat/completions", json.dumps(CHAT).encode()))
    service.wait_until_idle()
    page = service.metrics()

    for prefix, ready in (("inference_pool", "ready_pods"), ("llm_d_epp", "ready_endpoints")):
        assert f'{prefix}_{ready}{{name="*"}} 2.0' in page
        assert f'{prefix}_average_queue_size{{name="*"}} 0.0' in page
        assert f'{prefix}_average_running_requests{{name="*"}} ' in page
        assert f'{prefix}_average_kv_cache_utilization{{name="*"}} ' in page


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prefill_and_decode_meet(
    gateway: AgentGateway, engines: tuple[HostedEngine, ...], service: ServiceProcess, *, stream: bool
) -> None:
    """The gateway sends the decode leg, and the service the prefill leg with the same room."""
    response = asyncio.run(gateway.post("/v1/chat/completions", json.dumps({**PAIR, "stream": stream}).encode()))
    legs = one([engines[2]]), one([engines[3]])

    assert response.status == 200, response.body
    assert response.body.endswith(b"data: [DONE]\n\n") == stream
    assert len({body_of(leg)["bootstrap_room"] for leg in legs}) == 1
    service.wait_until_idle()


def test_a_failed_prefill_is_an_error_for_the_client(
    gateway: AgentGateway, engines: tuple[HostedEngine, ...], service: ServiceProcess
) -> None:
    """The service answers in place of decode, which would have waited."""
    engines[2].fault(inference=Fault(Kind.INTERNAL))
    response = asyncio.run(gateway.post("/v1/chat/completions", json.dumps(PAIR).encode()))
    engines[2].server.faults.active.clear()

    assert (response.status, response.headers["x-dp-extproc-reason"]) == (502, "prefill_failed")
    service.wait_until_idle()
