"""Clients that try to steer requests: by headers, by trailers, by what is in bodies; with the service and without."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from dp_extproc import contract
from faults.fleet import BODIES, Fleet, run_fleet
from faults.trap import Trap
from patience import wait_for

CHAT, GENERATE = BODIES
HOSTS = (
    contract.DECODE_HOST,
    contract.PREFILL_HOST,
    contract.OWNER,
    "x-envoy-original-dst-host",
    "x-envoy-decorator-operation",
)
"""Headers in which an address might be believed."""
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
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with run_fleet(envoy={"session_header": "x-conversation"}) as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    """A fleet whose engines remember nothing."""
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


def _lies(address: str) -> list[tuple[str, str]]:
    lies = [
        *((name, address) for name in HOSTS),
        (contract.FAILED, address),
        (contract.AVOID, address),
        *OTHERS.items(),
    ]
    return [(spelt, value) for name, value in lies for spelt in (name, name.upper())]


@pytest.mark.parametrize("path", BODIES)
def test_no_header_of_a_client_steers_a_request(fleet: Fleet, trap: Trap, path: str) -> None:
    """Headers that steer inside have no effect from outside: both legs go where the service says, without them."""
    answer = fleet.client.post(path, json=BODIES[path], headers=_lies(trap.address))

    assert answer.status_code == 200
    assert trap.visits == 0
    received = [record for engine in fleet.engines for record in engine.requests()]
    assert len(received) == 2
    for record in received:
        assert not {name for name in record["headers"] if name.startswith(("x-dp-", "x-override-", "x-envoy-"))}
        assert "x-data-parallel-rank" not in record["headers"]
        assert "intruder" not in record["body"]


def test_no_header_of_a_client_steers_a_request_while_the_service_is_down(fleet: Fleet, trap: Trap) -> None:
    """Nobody answers for a decision that a client made up: 503, and no server is dialled."""
    with _down(fleet):
        for path in (CHAT, GENERATE, "/health", "/v1/models", "/anything"):
            method = "POST" if path in BODIES else "GET"
            answer = fleet.client.request(method, path, json=BODIES.get(path), headers=_lies(trap.address))
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "service_unavailable"

    assert trap.visits == 0
    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_trailers_are_no_headers(fleet: Fleet, trap: Trap) -> None:
    """What comes behind a chunked body does not steer either."""
    host, port = fleet.envoy.url.removeprefix("http://").split(":")
    body = json.dumps(BODIES[GENERATE]).encode()
    trailers = "".join(f"{name}: {trap.address}\r\n" for name in HOSTS)
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head.encode() + b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(body), body, trailers.encode()))
        answer = client.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
    assert trap.visits == 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("m\r\nx-dp-decode-host: TRAP\r\n\r\n", id="line breaks"),
        pytest.param("m\n\n{}", id="bare line feeds"),
        pytest.param("m\0x", id="a zero"),
        pytest.param("m\u0085\u2028\x7f", id="other control characters"),
        pytest.param("m\u00e9\U0001f98a", id="letters beyond ASCII"),
        pytest.param('m","pool":"x', id="quotes"),
        pytest.param("%DOWNSTREAM_REMOTE_ADDRESS% %REQ(authorization)%", id="commands of the access log"),
        pytest.param("m" * 100_000, id="very long"),
    ],
)
def test_nothing_in_a_body_gets_into_headers_or_logs(fleet: Fleet, trap: Trap, text: str) -> None:
    """Whatever fields say, each leg has its own headers, and the access log one line per leg that can be read."""
    text = text.replace("TRAP", trap.address)
    request_id = f"intruder-{abs(hash(text))}"
    fields = {"model": text, "rid": text, "user": text, "session_id": text, "bootstrap_host": text, "priority": 1}
    answer = fleet.client.post(GENERATE, json={**BODIES[GENERATE], **fields}, headers={"x-request-id": request_id})

    assert answer.status_code == 200
    lines = fleet.envoy.wait_for_access_log(request_id, 2)
    assert sorted(line["leg"] for line in lines) == ["main", "prefill"]
    assert all(line["status"] == 200 for line in lines)
    assert trap.visits == 0


@pytest.mark.parametrize("value", [b"caf\xe9", b"\xff\xfe", b"a" * 5000, b'","x":"', b"a\tb"], ids=repr)
def test_any_name_of_a_conversation_is_harmless(fleet: Fleet, value: bytes) -> None:
    """The one header that is taken over from clients may hold whatever HTTP lets through."""
    answer = fleet.client.post(GENERATE, json=BODIES[GENERATE], headers={b"x-conversation": value})

    assert answer.status_code == 200


def test_too_many_or_too_large_headers(fleet: Fleet) -> None:
    """They are refused at the front door; no engine sees them."""
    many = {f"x-{number}": "1" for number in range(150)}
    large = {"x-large": "a" * 100_000}
    for headers in (many, large):
        assert fleet.client.post(GENERATE, json=BODIES[GENERATE], headers=headers).status_code == 431

    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_a_deep_or_wide_body(fleet: Fleet) -> None:
    """Bodies that would cost more than they are worth are refused before anybody reads them twice."""
    deep = b'{"text":"a","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    wide = json.dumps({"text": ["a"] * 5000}).encode()
    for body in (deep, wide):
        answer = fleet.client.post(GENERATE, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.headers["x-dp-extproc-reason"]

    assert [record for engine in fleet.engines for record in engine.requests()] == []


def test_the_service_outlives_them_all(fleet: Fleet) -> None:
    """After all of this nothing is on the books, and the next request is served."""
    assert httpx.get(f"{fleet.service.admin_url}/readyz").status_code == 200
    assert fleet.client.post(CHAT, json=BODIES[CHAT]).status_code == 200
    wait_for(lambda: not fleet.reserved())
