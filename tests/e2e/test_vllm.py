"""Aggregated vLLM works behind Envoy: it is detected, gets ranks by header, and reports load per engine label."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST, body_of, one
from patience import wait_for


@dataclass(frozen=True, slots=True)
class Fleet:
    """Pools of vLLM, and one of SGLang beside them."""

    multiplexed: HostedEngine
    old: HostedEngine
    ports: tuple[HostedEngine, HostedEngine]
    sglang: HostedEngine
    client: httpx.Client
    service: ServiceProcess

    def forget(self) -> None:
        for engine in (self.multiplexed, self.old, *self.ports, self.sglang):
            engine.forget()


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = HostedEngines()
        vllm = ("--kind", "vllm", *FAST)
        multiplexed = engines.add(*vllm, "--dp-size", "3", "--max-total-tokens", "160000")
        old = engines.add(*vllm, "--dp-size", "2", "--vllm-version", "0.10.2")
        ports = engines.add(*vllm), engines.add(*vllm)
        sglang = engines.add("--dp-size", "2", *FAST)
        running.enter_context(engines)
        pools = [
            {"models": ["multiplexed"], "workers": {"endpoints": [multiplexed.url]}},
            {"models": ["old"], "engine": "vllm", "workers": {"endpoints": [old.url]}},
            {"models": ["ports"], "workers": {"endpoints": [each.url for each in ports]}},
            {"models": ["sglang"], "workers": {"endpoints": [sglang.url]}},
        ]
        service = running.enter_context(ServiceProcess(write_config(pools)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(multiplexed, old, ports, sglang, client, service)


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.forget()
    return running


def chat(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_rank_is_reached_by_header(fleet: Fleet, path: str) -> None:
    """The header names the rank, the engine runs the request there, and the body stays as the client sent it."""
    ranks = set()
    sent = chat("multiplexed") if "chat" in path else {"model": "multiplexed", "prompt": "p", "max_tokens": 2}
    for _ in range(80):  # ties are broken at random
        fleet.multiplexed.forget()
        response = fleet.client.post(path, json=sent, headers={"x-data-parallel-rank": "7"})
        assert response.status_code == 200, response.text
        request = one([fleet.multiplexed])
        assert request["headers"]["x-data-parallel-rank"] == str(request["rank"])
        assert body_of(request) == sent
        ranks.add(request["rank"])
        if len(ranks) == 3:
            break

    assert ranks == {0, 1, 2}


def test_a_stream_arrives_from_vllm(fleet: Fleet) -> None:
    """A stream arrives to its end."""
    with fleet.client.stream("POST", "/v1/chat/completions", json=chat("multiplexed", stream=True)) as response:
        lines = [line for line in response.iter_lines() if line]

    assert response.status_code == 200
    assert lines[-1] == "data: [DONE]"


def test_load_per_rank_is_read_from_metrics(fleet: Fleet) -> None:
    """The admin port shows the values that ``/metrics`` has of each engine label: ranks, capacity, prompt tokens."""
    page = {endpoint["url"]: endpoint for endpoint in fleet.service.loads()["endpoints"]}
    ranks = page[fleet.multiplexed.url]["ranks"]

    assert [rank["dp_rank"] for rank in ranks] == [0, 1, 2]
    assert {rank["sample"]["capacity_tokens"] for rank in ranks} == {160000}
    assert page[fleet.multiplexed.url]["version"] == "0.11.0"
    assert [len(page[each.url]["ranks"]) for each in fleet.ports] == [1, 1]


def test_an_old_release_picks_its_rank_itself(fleet: Fleet) -> None:
    """It gets no rank, and the log reports the reason once."""
    for _ in range(3):
        fleet.old.forget()
        assert fleet.client.post("/v1/chat/completions", json=chat("old")).status_code == 200
        assert "x-data-parallel-rank" not in one([fleet.old])["headers"]

    assert fleet.service.log().count(f"{fleet.old.url}: rank_not_carried: ") == 1


def test_ranks_with_their_own_ports_need_no_header(fleet: Fleet) -> None:
    """Each port is an endpoint of one rank: both are used, and need no header."""
    used = set()
    for _ in range(40):
        for each in fleet.ports:
            each.forget()
        assert fleet.client.post("/v1/chat/completions", json=chat("ports")).status_code == 200
        request = one(fleet.ports)
        assert "x-data-parallel-rank" not in request["headers"]
        used.add(next(each.port for each in fleet.ports if each.requests()))
        if len(used) == 2:
            break

    assert len(used) == 2


def test_an_sglang_pool_beside_vllm_gets_ranks_in_bodies(fleet: Fleet) -> None:
    """The same client's request to an SGLang pool has the rank in its body."""
    assert fleet.client.post("/v1/chat/completions", json=chat("sglang")).status_code == 200
    request = wait_for(lambda: one([fleet.sglang]))

    assert body_of(request)["routed_dp_rank"] == request["rank"]
    assert "x-data-parallel-rank" not in request["headers"]


def test_a_path_is_rejected_if_vllm_does_not_have_it(fleet: Fleet) -> None:
    """``/generate`` is SGLang's, and the rejection names the engine of this pool."""
    response = fleet.client.post("/generate", json={"text": "a", "model": "multiplexed"})

    assert response.status_code == 400
    assert "vLLM 0.11.0" in response.json()["error"]["message"]


def test_the_stand_in_implements_the_contract_of_vllm(fleet: Fleet) -> None:
    """Sent directly, a rank out of range is a 400, no number counts as no rank, and SGLang's pages are missing."""
    url = fleet.multiplexed.url
    wrong = httpx.post(f"{url}/v1/completions", json={"prompt": "p"}, headers={"x-data-parallel-rank": "3"})
    odd = httpx.post(
        f"{url}/v1/completions", json={"prompt": "p", "routed_dp_rank": 9}, headers={"x-data-parallel-rank": "x"}
    )

    message = "data_parallel_rank 3 is out of range [0, 3)."
    expected = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    assert (wrong.status_code, json.loads(wrong.content)) == (400, expected)
    assert odd.status_code == 200
    assert [httpx.get(f"{url}{path}").status_code for path in ("/server_info", "/v1/loads", "/version")] == [
        404,
        404,
        200,
    ]
