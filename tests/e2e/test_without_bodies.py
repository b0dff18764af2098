"""With ``envoy.body_mode: none`` bodies go to both engines unread, and headers schedule and route requests."""

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
    """Two pairs of engines behind an Envoy that sends no bodies to the service."""

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
def test_both_legs_get_the_bytes_of_the_client(fleet: Fleet, path: str, body: dict[str, Any], stream: bool) -> None:
    """Each leg runs on the rank of its headers, and the client's own ranks and rooms have no effect."""
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
def test_responses_reach_the_client_unchanged(fleet: Fleet, stream: bool) -> None:
    """The client library reads the responses, and one that is not a stream keeps its length."""
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
def test_a_batch_runs_on_one_pair_of_ranks(fleet: Fleet, stream: bool) -> None:
    """Rooms of a batch count up from the one in the headers; with named ranks all of it runs on one pair."""
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
def test_a_failed_leg_is_retried_without_bodies(
    fleet: Fleet, role: str, path: str, body: dict[str, Any], stream: bool
) -> None:
    """A failure behind a 200 shows in the first event of either leg, and the request is retried.

    The engines fail in two ways, because a request that two engines answer alike is not tried a third time.
    """
    engines = fleet.prefills if role == "prefill" else fleet.decodes
    for engine, kind in zip(engines, (Kind.FAIL, Kind.INTERNAL), strict=True):
        engine.fault(inference=Fault(kind, times=1))
    answers = [fleet.client.post(path, json={**body, "stream": stream}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert not [answer.text for answer in answers if "error" in answer.text or "abort" in answer.text]
    assert len([request for each in engines for request in each.requests()]) == 3 + len(engines)


def connect(fleet: Fleet, length: int) -> socket.socket:
    """Begin a request that declares so many bytes, and send one of them."""
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
    """Let httpx send a body in chunks, without its length."""
    for start in range(0, len(text), 50_000):
        yield text[start : start + 50_000]


@pytest.mark.parametrize("size", [10, 3 << 20, 12 << 20])
@pytest.mark.parametrize("announced", [True, False], ids=["with its length", "in chunks"])
def test_bodies_of_any_size_arrive_on_both_legs(fleet: Fleet, size: int, announced: bool) -> None:
    """Bodies of any size arrive on both legs without delay and without loss."""
    text = json.dumps({**GENERATE, "padding": "x" * size}).encode()
    headers = {"content-type": "application/json"}
    response = fleet.client.post("/generate", content=text if announced else chunks(text), headers=headers)
    assert response.status_code == 200
    prefill, decode = fleet.legs()

    assert prefill["body_length"] == decode["body_length"] == len(text)


def test_a_body_is_rejected_by_its_declared_length(fleet: Fleet) -> None:
    """A request with too large a declared length is rejected before its body arrives."""
    with connect(fleet, length=1 << 40) as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_paths_without_override_headers_are_rejected(fleet: Fleet, path: str) -> None:
    """The service rejects these paths, and no engine gets the request."""
    response = fleet.client.post(path, json={"prompt": "a", "input": "a"})

    assert (response.status_code, response.json()["error"]["code"]) == (400, "path_cannot_carry_routing_fields")
    assert [request for engine in (*fleet.prefills, *fleet.decodes) for request in engine.requests()] == []


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"text":7}'])
def test_a_bad_body_is_rejected_by_the_engines(fleet: Fleet, body: bytes) -> None:
    """No part of the router reads the body, so both engines reject it, and the client gets their text."""
    response = fleet.client.post("/generate", content=body, headers={"content-type": "application/json"})

    assert response.status_code in {400, 422}
    fleet.service.wait_until_idle()


def test_lookups_work_without_bodies(fleet: Fleet) -> None:
    """Requests without a body work as in other modes."""
    assert fleet.client.get("/health").status_code == 200
    assert fleet.client.get("/v1/models").status_code == 200


def test_passed_paths_work_without_bodies(fleet: Fleet) -> None:
    """The body goes to a decode engine unread, and paths that no engine may get from a client stay refused."""
    tokens = fleet.client.post("/tokenize", json={"model": "m", "prompt": "hi"})
    control = fleet.client.post("/flush_cache")

    assert (tokens.status_code, tokens.json()["count"]) == (200, 2)
    assert control.status_code == 403
    assert [request["path"] for engine in fleet.decodes for request in engine.requests()] == ["/tokenize"]
    assert [request for engine in fleet.prefills for request in engine.requests()] == []


def test_reservations_end_when_a_client_disconnects_while_it_sends(fleet: Fleet) -> None:
    """A client that disconnects while it sends leaves no reservation."""
    with connect(fleet, length=99):
        wait_for(lambda: "dp_extproc_active_streams 1.0" in fleet.service.metrics())

    fleet.service.wait_until_idle()
