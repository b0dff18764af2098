"""An Envoy with the shipped ``protocol: endpoint_picker`` example routes to what the service picks."""

import gzip
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import load_gateway
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST, body_of, one

SUBSET = "x-test-subset"
"""Header of this test that becomes the gateway's subset hint."""
LIAR = "x-test-served"
"""Header of this test by which the gateway reports a wrong endpoint as the one that served."""
CONVERSATION = "x-conversation"
MOST_REQUESTS = 2
"""Limit of requests on a rank."""
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

ORIGINAL_DST = """
name: workers
type: ORIGINAL_DST
lb_policy: CLUSTER_PROVIDED
original_dst_lb_config: {use_http_header: true, http_header_name: x-gateway-destination-endpoint}
"""
HINT = f"""
name: envoy.filters.http.header_to_metadata
typed_config:
  "@type": type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config
  request_rules:
    - header: {SUBSET}
      on_header_present:
        {{metadata_namespace: envoy.lb.subset_hint, key: x-gateway-destination-endpoint-subset, type: STRING}}
"""
SERVED = f"""
name: envoy.filters.http.lua
typed_config:
  "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
  default_source_code:
    inline_string: |
      function envoy_on_request(handle)
        handle:streamInfo():dynamicMetadata():set("test", "served", handle:headers():get("{LIAR}") or "")
      end
      function envoy_on_response(handle)
        local served = handle:streamInfo():dynamicMetadata():get("test")["served"]
        if served == "" then served = handle:headers():get("x-upstream") end
        handle:streamInfo():dynamicMetadata():set("envoy.lb", "x-gateway-destination-endpoint-served", served)
      end
"""


@dataclass(frozen=True, slots=True)
class Gateway:
    """Two aggregated engines behind a gateway."""

    workers: tuple[HostedEngine, HostedEngine]
    client: httpx.Client
    service: ServiceProcess

    def forget(self) -> None:
        for worker in self.workers:
            worker.forget()


@pytest.fixture(scope="module", params=["override_host", "original_dst"])
def running(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with ExitStack() as running:
        engines = HostedEngines()
        workers = engines.add("--dp-size", "2", *FAST), engines.add("--dp-size", "2", *FAST)
        running.enter_context(engines)
        pool = {"models": ["*"], "workers": {"endpoints": [each.url for each in workers]}}
        sections: dict[str, Any] = {
            "admission": {"max_requests": MOST_REQUESTS},
            "envoy": {"session_header": CONVERSATION},
        }
        content = write_config([pool], **sections)
        service = running.enter_context(ServiceProcess({**content, "protocol": "endpoint_picker"}))
        bootstrap = _gateway(service, workers, request.param)
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=bootstrap))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Gateway(workers, client, service)


@pytest.fixture
def gateway(running: Gateway) -> Gateway:
    running.forget()
    return running


def _gateway(service: ServiceProcess, workers: tuple[HostedEngine, ...], routing: str) -> str:
    """Build the example with the ports of this test, its additions, and the gateway's way of routing."""
    example: dict[str, Any] = load_gateway(service.config, [each.port for each in workers])
    resources = example["static_resources"]
    listener, cluster = resources["listeners"][0], resources["clusters"][1]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"][:0] = [yaml.safe_load(HINT)]
    manager["http_filters"][-1:-1] = [yaml.safe_load(SERVED)]
    served = {"header": {"key": "x-upstream", "value": "%UPSTREAM_REMOTE_ADDRESS%"}}
    manager["route_config"]["virtual_hosts"][0]["response_headers_to_add"] = [served]
    if routing == "original_dst":
        resources["clusters"][1] = yaml.safe_load(ORIGINAL_DST)
    elif routing != "override_host":  # only one of its sources
        policy = cluster["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]
        policy["override_host_sources"] = [each for each in policy["override_host_sources"] if routing in each]
        assert len(policy["override_host_sources"]) == 1
    return yaml.safe_dump(example)


def address_of(worker: HostedEngine) -> str:
    return worker.url.removeprefix("http://")


@pytest.mark.parametrize("running", ["metadata", "header"], indirect=True)
def test_a_gateway_routes_to_the_pick_by_header_or_metadata_alone(gateway: Gateway) -> None:
    """A gateway that reads only the metadata, or only the header, routes every request to the pick."""
    used = set()
    for _ in range(20):
        gateway.forget()
        response = gateway.client.post("/v1/chat/completions", json=CHAT)
        request = one(gateway.workers)
        (worker,) = [each for each in gateway.workers if each.requests()]
        assert request["headers"]["x-gateway-destination-endpoint"] == address_of(worker)
        assert response.headers["x-upstream"] == address_of(worker)
        used.add(worker.port)

    assert len(used) == 2


def test_requests_reach_the_picked_endpoint_and_rank(gateway: Gateway) -> None:
    """Header and metadata lead to the picked endpoint, and the body to its rank; both endpoints and ranks are used."""
    used = set()
    for _ in range(60):
        gateway.forget()
        response = gateway.client.post(
            "/v1/chat/completions", json=CHAT, headers={"x-gateway-destination-endpoint": "127.0.0.1:1"}
        )
        assert response.status_code == 200, response.text
        request = one(gateway.workers)
        (worker,) = [each for each in gateway.workers if each.requests()]
        assert request["headers"]["x-gateway-destination-endpoint"] == address_of(worker)
        assert response.headers["x-upstream"] == address_of(worker)
        assert body_of(request) == {"routed_dp_rank": request["rank"], **CHAT}
        assert "x-dp-decode-host" not in request["headers"]
        used.add((worker.port, request["rank"]))
        if len(used) == 4:
            break

    assert len(used) == 4


def test_a_conversation_returns_to_its_rank_by_the_client_header(gateway: Gateway) -> None:
    """The service reads the client's own session header, and ignores a value under its internal name."""
    used: dict[str, set[tuple[int, int]]] = {CONVERSATION: set(), "x-dp-session": set()}
    for name, places in used.items():
        for number in range(12):
            gateway.forget()
            content = f"{name} {number} " * 200  # no two prompts share a beginning
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            assert gateway.client.post("/v1/chat/completions", json=body, headers={name: "chat-1"}).status_code == 200
            gateway.service.wait_until_idle()
            request = one(gateway.workers)
            (worker,) = [each for each in gateway.workers if each.requests()]
            places.add((worker.port, request["rank"]))

    assert len(used[CONVERSATION]) == 1
    assert len(used["x-dp-session"]) > 1


@pytest.mark.parametrize("form", ["{address}", "{address} , 127.0.0.1:1", "127.0.0.1:1,{address}"])
def test_a_subset_hint_limits_the_pick(gateway: Gateway, form: str) -> None:
    """The service picks from the subset hint, also if it lists unknown addresses."""
    wanted = gateway.workers[1]
    for _ in range(6):
        gateway.forget()
        hint = {SUBSET: form.format(address=address_of(wanted))}
        assert gateway.client.post("/v1/chat/completions", json=CHAT, headers=hint).status_code == 200
        assert one([wanted])["outcome"] == "finished"
        assert gateway.workers[0].requests() == []


def test_a_subset_hint_without_a_port_allows_all_ports(gateway: Gateway) -> None:
    """The protocol defines an address without a port as all its ports."""
    response = gateway.client.post("/v1/chat/completions", json=CHAT, headers={SUBSET: "127.0.0.1"})

    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_a_subset_hint_without_a_ready_endpoint_gives_503(gateway: Gateway, path: str) -> None:
    """A subset without a ready endpoint gives a 503, and no engine gets the request."""
    response = gateway.client.post(path, json=CHAT, headers={SUBSET: "10.9.9.9:1"})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_endpoints")
    assert [request for worker in gateway.workers for request in worker.requests()] == []


def test_an_unreadable_request_reaches_any_endpoint_unchanged(gateway: Gateway) -> None:
    """The gateway sends other paths, other methods and compressed bodies here, so they go to any endpoint."""
    assert gateway.client.get("/v1/models").json()["data"][0]["id"] == "strict-engine"
    embedding = gateway.client.post("/v1/embeddings", json={"input": "a"})
    assert (embedding.status_code, "embedding model" in embedding.text) == (400, True)
    packed = gzip.compress(json.dumps(CHAT).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = gateway.client.post("/v1/chat/completions", content=packed, headers=headers)
    assert answer.status_code == 400  # the stand-in does not decompress
    assert "x-upstream" in answer.headers


def test_a_passed_path_reaches_an_endpoint_and_control_reaches_none(gateway: Gateway) -> None:
    """The gateway has chosen these endpoints for clients, but no client may stop an engine."""
    tokens = gateway.client.post("/tokenize", json={"prompt": "hi"})
    control = gateway.client.post("/pause_generation", json={})

    assert (tokens.status_code, tokens.json()["count"]) == (200, 2)
    assert (control.status_code, control.json()["error"]["code"]) == (403, "path_refused")
    assert [request["path"] for worker in gateway.workers for request in worker.requests()] == ["/tokenize"]


def test_a_stream_leaves_no_reservation(gateway: Gateway) -> None:
    """A stream arrives whole, and no reservation is left."""
    with gateway.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]

    assert lines[-1] == "data: [DONE]"
    gateway.service.wait_until_idle()


def test_a_destination_mismatch_is_counted(gateway: Gateway) -> None:
    """The service counts a response from another endpoint than the pick, and ignores one from the pick."""

    def elsewhere(**headers: str) -> float:
        assert gateway.client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        gateway.service.wait_until_idle()
        lines = gateway.service.metrics().splitlines()
        name = "dp_extproc_destination_mismatches_total"
        return next(float(line.split()[1]) for line in lines if line.startswith(name))

    before = elsewhere()
    assert elsewhere() == before
    assert elsewhere(**{LIAR: "127.0.0.1:7"}) == before + 1


@pytest.mark.parametrize("size", [200_000, 1 << 20])
def test_large_bodies_arrive_unchanged_on_both_legs(gateway: Gateway, size: int) -> None:
    """Bodies of many chunks arrive whole."""
    sent = {"padding": "x" * size, **CHAT}
    assert gateway.client.post("/v1/chat/completions", json=sent).status_code == 200
    request = one(gateway.workers)

    assert request["body_length"] == len(json.dumps({"routed_dp_rank": 0, **sent}, separators=(",", ":")))


def test_a_request_is_rejected_if_no_rank_has_room(gateway: Gateway) -> None:
    """A request that fits on no rank gets a 429.

    This is the last test, because the engines seem busy for a while after it.
    """
    endless = {**CHAT, "max_tokens": 1_000_000, "stream": True}
    with ExitStack() as streams:
        answers: list[httpx.Response] = []
        while not answers or (answers[-1].status_code == 200 and len(answers) <= 8 * MOST_REQUESTS):
            answers.append(streams.enter_context(gateway.client.stream("POST", "/v1/chat/completions", json=endless)))

    assert len(answers) > 4
    assert (answers[-1].status_code, answers[-1].headers["retry-after"]) == (429, "1")
    gateway.service.wait_until_idle()
