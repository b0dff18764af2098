"""Clients cannot control routing by headers, trailers or bodies, with or without the service."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from dp_extproc import contract
from faults.decoy import Decoy
from faults.fleet import BODIES, Fleet, run_fleet
from patience import wait_for

CHAT, GENERATE = BODIES
HOSTS = (
    contract.DECODE_HOST,
    contract.PREFILL_HOST,
    contract.OWNER,
    "x-envoy-original-dst-host",
    "x-envoy-decorator-operation",
)
"""Headers in which the router could accept an address."""
OTHERS = {
    contract.LEG: "0" * 24,
    contract.PREFILL_PREFIX: '{"rid":"intruder",',
    contract.PREFIX_LENGTH: "1",
    contract.WATCH: "1",
    contract.RETRY: "1",
    contract.STAGE: contract.FIRST_EVENT,
    "x-override-routed-dp-rank": "1",
    "x-data-parallel-rank": "1",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-retry-on": "5xx",
    "x-envoy-force-trace": "1",
}


@pytest.fixture
def decoy() -> Iterator[Decoy]:
    decoy = Decoy()
    yield decoy
    decoy.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with run_fleet(envoy={"session_header": "x-conversation"}) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    """Give a fleet with empty request journals."""
    running.settle()
    running.forget()
    return running


@contextmanager
def _down(fleet: Fleet) -> Iterator[None]:
    fleet.service.stop()
    try:
        yield
    finally:
        fleet.restart_service()
        fleet.service.wait_until_ready()


def _forged_headers(address: str) -> list[tuple[str, str]]:
    forged_headers = [
        *((name, address) for name in HOSTS),
        (contract.FAILED, address),
        (contract.AVOID, address),
        *OTHERS.items(),
    ]
    return [(spelt, value) for name, value in forged_headers for spelt in (name, name.upper())]


@pytest.mark.parametrize("path", BODIES)
def test_a_client_header_controls_no_routing(fleet: Fleet, decoy: Decoy, path: str) -> None:
    """Internal headers have no effect from outside: both legs go to the service's pick, without these headers."""
    answer = fleet.client.post(path, json=BODIES[path], headers=_forged_headers(decoy.address))

    assert answer.status_code == 200
    assert decoy.visits == 0
    received = [record for engine in fleet.engines for record in engine.requests()]
    assert len(received) == 2
    for record in received:
        assert not {name for name in record["headers"] if name.startswith(("x-dp-", "x-override-", "x-envoy-"))}
        assert "x-data-parallel-rank" not in record["headers"]
        assert "intruder" not in record["body"]


def test_a_client_header_controls_no_routing_while_the_service_is_down(fleet: Fleet, decoy: Decoy) -> None:
    """Envoy does not accept a decision from a client: it answers 503 and connects to no engine."""
    with _down(fleet):
        for path in (CHAT, GENERATE, "/health", "/v1/models", "/anything"):
            method = "POST" if path in BODIES else "GET"
            answer = fleet.client.request(method, path, json=BODIES.get(path), headers=_forged_headers(decoy.address))
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "service_unavailable"

    assert decoy.visits == 0
    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_a_trailer_controls_no_routing(fleet: Fleet, decoy: Decoy) -> None:
    """Trailers behind a chunked body do not control routing either."""
    host, port = fleet.envoy.url.removeprefix("http://").split(":")
    body = json.dumps(BODIES[GENERATE]).encode()
    trailers = "".join(f"{name}: {decoy.address}\r\n" for name in HOSTS)
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.encode() + b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(body), body, trailers.encode()))
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
    assert decoy.visits == 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("m\r\nx-dp-decode-host: DECOY\r\n\r\n", id="line breaks"),
        pytest.param("m\n\n{}", id="bare line feeds"),
        pytest.param("m\0x", id="a zero"),
        pytest.param("m\u0085\u2028\x7f", id="other control characters"),
        pytest.param("m\u00e9\U0001f98a", id="letters beyond ASCII"),
        pytest.param('m","pool":"x', id="quotes"),
        pytest.param("%DOWNSTREAM_REMOTE_ADDRESS% %REQ(authorization)%", id="commands of the access log"),
        pytest.param("m" * 100_000, id="very long"),
    ],
)
def test_a_body_field_never_reaches_headers_or_logs(fleet: Fleet, decoy: Decoy, text: str) -> None:
    """Whatever the fields contain, each leg has its own headers, and the access log one valid line per leg."""
    text = text.replace("DECOY", decoy.address)
    request_id = f"intruder-{abs(hash(text))}"
    fields = {"model": text, "rid": text, "user": text, "session_id": text, "bootstrap_host": text, "priority": 1}
    answer = fleet.client.post(GENERATE, json={**BODIES[GENERATE], **fields}, headers={"x-request-id": request_id})

    assert answer.status_code == 200
    lines = fleet.envoy.wait_for_access_log(request_id, 2)
    assert sorted(line["leg"] for line in lines) == ["main", "prefill"]
    assert all(line["status"] == 200 for line in lines)
    assert decoy.visits == 0


@pytest.mark.parametrize("value", [b"caf\xe9", b"\xff\xfe", b"a" * 5000, b'","x":"', b"a\tb"], ids=repr)
def test_a_session_header_is_harmless_with_any_value(fleet: Fleet, value: bytes) -> None:
    """The one header that is copied from clients may contain anything that HTTP allows."""
    answer = fleet.client.post(GENERATE, json=BODIES[GENERATE], headers={b"x-conversation": value})

    assert answer.status_code == 200


def test_headers_are_rejected_if_too_many_or_too_large(fleet: Fleet) -> None:
    """The front door rejects them, and no engine receives them."""
    many = {f"x-{number}": "1" for number in range(150)}
    large = {"x-large": "a" * 100_000}
    for headers in (many, large):
        assert fleet.client.post(GENERATE, json=BODIES[GENERATE], headers=headers).status_code == 431

    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_a_body_is_rejected_if_too_deep_or_too_wide(fleet: Fleet) -> None:
    """Bodies that would be too expensive to read are rejected before they are read twice."""
    deep = b'{"text":"a","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    wide = json.dumps({"text": ["a"] * 5000}).encode()
    for body in (deep, wide):
        answer = fleet.client.post(GENERATE, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.headers["x-dp-extproc-reason"]

    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_the_service_serves_after_all_attacks(fleet: Fleet) -> None:
    """After all of this no reservation is left, and the next request is served."""
    assert httpx.get(f"{fleet.service.admin_url}/readyz").status_code == 200
    assert fleet.client.post(CHAT, json=BODIES[CHAT]).status_code == 200
    wait_for(lambda: not fleet.reserved())
