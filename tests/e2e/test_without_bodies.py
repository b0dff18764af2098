"""``envoy.body_mode: none``: bodies go from clients to both engines unseen; headers place requests and tell engines."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from dp_extproc.lab.engine.api.faults import Fault, Kind
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import DECODE_RANKS, EVIL, FAST, PREFILL_RANKS, one
from patience import wait_for

GENERATE = {"text": "a b c", "sampling_params": {"max_new_tokens": 4}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "model": "m"}
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@dataclass(frozen=True, slots=True)
class Fleet:
    """Two pairs of servers behind an Envoy that sends no bodies to the service."""

    prefills: tuple[HostedEngine, ...]
    decodes: tuple[HostedEngine, ...]
    client: httpx.Client
    service: ServiceProcess
    envoy: EnvoyProcess

    def forget(self) -> None:
        for engine in (*self.prefills, *self.decodes):
            engine.forget()

    def legs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return one(self.prefills), one(self.decodes)


@pytest.fixture(scope="module", params=["off", "first_event"])
def running(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as running:
        options = ("--header-overrides", "--dp-attention", *FAST)
        engines = HostedEngines()
        prefills = tuple(engines.add("--role", "prefill", "--dp-size", str(PREFILL_RANKS), *options) for _ in range(2))
        decodes = tuple(engines.add("--role", "decode", "--dp-size", str(DECODE_RANKS), *options) for _ in range(2))
        running.enter_context(engines)
        pool = {
            "models": ["*"],
            "routing_fields": "headers",
            "prefill": {"endpoints": [each.url for each in prefills]},
            "decode": {"endpoints": [each.url for each in decodes]},
            "policy": {"affinity": {"prefixes": False}},
        }
        sections = {"envoy": {"body_mode": "none"}, "supervision": {"mode": request.param}}
        service = running.enter_context(ServiceProcess(write_config([pool], **sections)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(prefills, decodes, client, service, envoy)
        service.wait_until_idle()


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.forget()
    return running


def overrides(leg: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in leg["headers"].items() if name.startswith("x-override-")}


@STREAMS
@pytest.mark.parametrize(
    ("path", "body"), [("/generate", GENERATE), ("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGES)]
)
def test_both_legs_get_the_clients_bytes(fleet: Fleet, path: str, body: dict[str, Any], stream: bool) -> None:
    """Each runs on the rank that its headers name; the client's own ranks and rooms count for nothing."""
    pairs = set()
    for evil in ({}, *60 * [EVIL]):  # ties are broken at random
        fleet.forget()
        sent = json.dumps({**body, **evil, "stream": stream}, indent=1)
        response = fleet.client.post(path, content=sent, headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text
        prefill, decode = fleet.legs()
        assert prefill["body"] == decode["body"] == sent
        assert prefill["outcome"] == decode["outcome"] == "finished"
        for leg in (prefill, decode):
            assert overrides(leg)["x-override-routed-dp-rank"] == str(leg["rank"])
            assert overrides(leg)["x-override-disagg-prefill-dp-rank"] == str(prefill["rank"])
            assert not [name for name in leg["headers"] if name.startswith("x-dp-")]
        pairs.add((prefill["rank"], decode["rank"]))
        if evil and len(pairs) > 1:
            break

    assert len(pairs) > 1


@STREAMS
def test_answers_reach_the_client_as_they_are(fleet: Fleet, stream: bool) -> None:
    """The client library reads them; an answer that is no stream keeps its length."""
    with openai.OpenAI(base_url=f"{fleet.envoy.url}/v1", api_key="key", max_retries=0) as client:
        kept = client.chat.completions.with_raw_response
        response = kept.create(model="m", messages=CHAT["messages"], max_tokens=4, stream=stream)  # type: ignore[call-overload]
        if stream:
            chunks = [chunk.choices[0].delta.content for chunk in response.parse() if chunk.choices]
            assert "".join(filter(None, chunks))
        else:
            assert response.parse().usage.completion_tokens == 4
            assert "content-length" in response.headers


@STREAMS
def test_a_batch(fleet: Fleet, stream: bool) -> None:
    """Its rooms count on from the one that the headers name; named ranks keep all of it on one pair."""
    body = {**GENERATE, "text": ["a", "b", "c"], "stream": stream}
    assert fleet.client.post("/generate", json=body).status_code == 200

    def legs() -> list[dict[str, Any]]:
        found = [request for engine in (*fleet.prefills, *fleet.decodes) for request in engine.requests()]
        return found if len(found) >= 2 and all(each["outcome"] == "finished" for each in found) else []

    assert {leg["rank"] is not None for leg in wait_for(legs)} == {True}


@pytest.mark.parametrize("running", ["first_event"], indirect=True)
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), [("/generate", GENERATE), ("/v1/chat/completions", CHAT)])
@STREAMS
def test_a_failed_leg_is_seen(fleet: Fleet, role: str, path: str, body: dict[str, Any], stream: bool) -> None:
    """Also when its engine begins with 200: the first event tells, of either leg, and the request is placed anew."""
    engines = fleet.prefills if role == "prefill" else fleet.decodes
    for engine in engines:
        engine.fault(inference=Fault(Kind.FAIL, times=1))
    answers = [fleet.client.post(path, json={**body, "stream": stream}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert not [answer.text for answer in answers if "error" in answer.text or "abort" in answer.text]
    assert len([request for each in engines for request in each.requests()]) == 3 + len(engines)


def connect(fleet: Fleet, length: int) -> socket.socket:
    """Begin a request that announces so many bytes, and send one of them."""
    host, port = fleet.envoy.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    head = (
        "POST /generate HTTP/1.1",
        "host: a",
        "content-type: application/json",
        f"content-length: {length}",
        "",
        "{",
    )
    client.sendall("\r\n".join(head).encode())
    return client


def chunks(text: bytes) -> Iterator[bytes]:
    """Have httpx send a body in chunks, without its length."""
    for start in range(0, len(text), 50_000):
        yield text[start : start + 50_000]


@pytest.mark.parametrize("size", [10, 3 << 20, 12 << 20])
@pytest.mark.parametrize("announced", [True, False], ids=["with its length", "in chunks"])
def test_bodies_of_any_size(fleet: Fleet, size: int, announced: bool) -> None:
    """Nothing holds them back and nothing of them is lost on either leg."""
    text = json.dumps({**GENERATE, "padding": "x" * size}).encode()
    headers = {"content-type": "application/json"}
    response = fleet.client.post("/generate", content=text if announced else chunks(text), headers=headers)
    assert response.status_code == 200
    prefill, decode = fleet.legs()

    assert prefill["body_length"] == decode["body_length"] == len(text)


def test_a_body_that_is_too_large(fleet: Fleet) -> None:
    """One that says so is refused before it comes."""
    with connect(fleet, length=1 << 40) as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_paths_that_read_no_headers(fleet: Fleet, path: str) -> None:
    """They are refused, and no engine sees them."""
    response = fleet.client.post(path, json={"prompt": "a", "input": "a"})

    assert (response.status_code, response.json()["error"]["code"]) == (400, "path_cannot_carry_routing_fields")
    assert [request for engine in (*fleet.prefills, *fleet.decodes) for request in engine.requests()] == []


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"text":7}'])
def test_what_is_wrong_with_a_body_the_engine_says(fleet: Fleet, body: bytes) -> None:
    """Nobody else reads it; both engines refuse it, and the client gets their word."""
    response = fleet.client.post("/generate", content=body, headers={"content-type": "application/json"})

    assert response.status_code in {400, 422}
    fleet.service.wait_until_idle()


def test_lookups(fleet: Fleet) -> None:
    """What needs no body is as ever."""
    assert fleet.client.get("/health").status_code == 200
    assert fleet.client.get("/v1/models").status_code == 200


def test_a_client_that_leaves_while_it_sends(fleet: Fleet) -> None:
    """Its books are emptied."""
    with connect(fleet, length=99):
        wait_for(lambda: "dp_extproc_active_streams 1.0" in fleet.service.metrics())

    fleet.service.wait_until_idle()
