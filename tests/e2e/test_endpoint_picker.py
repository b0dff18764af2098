"""``protocol: endpoint_picker``: an Envoy of others routes to what the service picks, from the shipped example."""

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
"""Header of this test by which the gateway says who has served, instead of the truth."""
CONVERSATION = "x-conversation"
MOST_REQUESTS = 2
"""On a rank."""
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
    """Two workers behind somebody else's Envoy."""

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
    """Take the example with the ports of this test, with what a gateway adds, and with its own way of routing."""
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
def test_each_way_of_telling_the_pick_is_enough(gateway: Gateway) -> None:
    """A gateway that looks at the metadata alone, or at the header alone, routes every request to the pick."""
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


def test_requests_go_where_the_service_says(gateway: Gateway) -> None:
    """Header and metadata lead to the picked endpoint, the body to its rank; both servers and ranks are used."""
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


def test_a_conversation_stays_where_its_prompts_are(gateway: Gateway) -> None:
    """The service reads the clients' own header, as nobody copies it here; what comes under our name counts nothing."""
    used: dict[str, set[tuple[int, int]]] = {CONVERSATION: set(), "x-dp-session": set()}
    for name, places in used.items():
        for number in range(12):
            gateway.forget()
            content = f"{name} {number} " * 200  # no two prompts begin alike
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            assert gateway.client.post("/v1/chat/completions", json=body, headers={name: "chat-1"}).status_code == 200
            gateway.service.wait_until_idle()
            request = one(gateway.workers)
            (worker,) = [each for each in gateway.workers if each.requests()]
            places.add((worker.port, request["rank"]))

    assert len(used[CONVERSATION]) == 1
    assert len(used["x-dp-session"]) > 1


@pytest.mark.parametrize("form", ["{address}", "{address} , 127.0.0.1:1", "127.0.0.1:1,{address}"])
def test_only_the_allowed_endpoints(gateway: Gateway, form: str) -> None:
    """A subset hint is obeyed, with and without others in it."""
    wanted = gateway.workers[1]
    for _ in range(6):
        gateway.forget()
        hint = {SUBSET: form.format(address=address_of(wanted))}
        assert gateway.client.post("/v1/chat/completions", json=CHAT, headers=hint).status_code == 200
        assert one([wanted])["outcome"] == "finished"
        assert gateway.workers[0].requests() == []


def test_an_address_without_a_port_allows_all_its_ports(gateway: Gateway) -> None:
    """As the protocol has it."""
    response = gateway.client.post("/v1/chat/completions", json=CHAT, headers={SUBSET: "127.0.0.1"})

    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_nobody_allowed(gateway: Gateway, path: str) -> None:
    """A subset in which nobody is ready is a 503, and no engine gets the request."""
    response = gateway.client.post(path, json=CHAT, headers={SUBSET: "10.9.9.9:1"})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_endpoints")
    assert [request for worker in gateway.workers for request in worker.requests()] == []


def test_what_is_not_read_is_passed_on(gateway: Gateway) -> None:
    """Other paths, other methods and compressed bodies go to any server as they are: the gateway sent them here."""
    assert gateway.client.get("/v1/models").json()["data"][0]["id"] == "strict-engine"
    embedding = gateway.client.post("/v1/embeddings", json={"input": "a"})
    assert (embedding.status_code, "embedding model" in embedding.text) == (400, True)
    packed = gzip.compress(json.dumps(CHAT).encode())
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = gateway.client.post("/v1/chat/completions", content=packed, headers=headers)
    assert answer.status_code == 400  # the stand-in does not unpack
    assert "x-upstream" in answer.headers


def test_streams_and_books(gateway: Gateway) -> None:
    """A stream comes through, and nothing stays on the books."""
    with gateway.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]

    assert lines[-1] == "data: [DONE]"
    gateway.service.wait_until_idle()


def test_who_has_served_is_compared(gateway: Gateway) -> None:
    """The gateway's word for another endpoint than the picked one is counted; its word for the same is not."""

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
def test_large_bodies(gateway: Gateway, size: int) -> None:
    """Bodies of many chunks arrive whole."""
    sent = {"padding": "x" * size, **CHAT}
    assert gateway.client.post("/v1/chat/completions", json=sent).status_code == 200
    request = one(gateway.workers)

    assert request["body_length"] == len(json.dumps({"routed_dp_rank": 0, **sent}, separators=(",", ":")))


def test_nobody_with_room(gateway: Gateway) -> None:
    """A request that no rank has room for is a 429. The last test: engines seem busy for a while after it."""
    endless = {**CHAT, "max_tokens": 1_000_000, "stream": True}
    with ExitStack() as streams:
        answers: list[httpx.Response] = []
        while not answers or (answers[-1].status_code == 200 and len(answers) <= 8 * MOST_REQUESTS):
            answers.append(streams.enter_context(gateway.client.stream("POST", "/v1/chat/completions", json=endless)))

    assert len(answers) > 4
    assert (answers[-1].status_code, answers[-1].headers["retry-after"]) == (429, "1")
    gateway.service.wait_until_idle()
