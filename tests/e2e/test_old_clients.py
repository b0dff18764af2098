"""Clients of every age are served, as the engines themselves would serve them."""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest

from e2e.stack import Stack, run_stack
from patience import wait_for

BODY: Final = b'{"prompt":"hi","max_tokens":3}'
STREAM: Final = b'{"prompt":"hi","max_tokens":3,"stream":true}'
ORIGIN: Final = "https://page.test"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came over a socket."""

    line: str
    headers: dict[str, str]
    body: bytes


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    settings = {"max_body_bytes": 1 << 20, "request_timeout": "3s"}
    with run_stack(envoy=settings) as running:
        yield running


def connect(stack: Stack) -> socket.socket:
    address = stack.service.config.envoy.inference
    return socket.create_connection((address.host, address.port), timeout=30)


def post(version: str, body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "content-type: application/json", f"content-length: {len(body)}", *headers]
    return "\r\n".join((*lines, "", "")).encode() + body


def read(connection: socket.socket, *, to_end: bool) -> Answer:
    """Read one answer: until the server closes, or as long as the answer itself claims to be."""
    received = b""
    while to_end or b"\r\n\r\n" not in received or len(received) < _length(received):
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    return Answer(
        line, {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}, body
    )


def _length(received: bytes) -> int:
    head = received.partition(b"\r\n\r\n")[0]
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return len(head) + 4 + (int(found[1]) if found else 0)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "streamed"])
@pytest.mark.parametrize("headers", [(), ("Host: llm.test", "Connection: close")], ids=["bare", "nginx"])
def test_answer_to_http_10_has_no_chunks_and_ends_by_a_close(
    stack: Stack, body: bytes, headers: tuple[str, ...]
) -> None:
    """This is what nginx sends by default, and ``ab``. A response without a length ends with its connection."""
    with connect(stack) as connection:
        connection.sendall(post("1.0", body, *headers))
        answer = read(connection, to_end=True)

    assert answer.line == "HTTP/1.0 200 OK"
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    text = answer.body
    assert text.endswith(b"data: [DONE]\n\n") if body is STREAM else json.loads(text)["object"] == "text_completion"


def test_connection_of_http_10_is_kept_on_request(stack: Stack) -> None:
    """``ab -k`` sends one request after the other on it."""
    with connect(stack) as connection:
        for _ in range(2):
            connection.sendall(post("1.0", BODY, "Connection: keep-alive"))
            answer = read(connection, to_end=False)
            assert (answer.line, answer.headers["connection"]) == ("HTTP/1.0 200 OK", "keep-alive")
            assert json.loads(answer.body)["object"] == "text_completion"


@pytest.mark.parametrize(
    "offer",
    [
        ("Upgrade: TLS/1.2", "Connection: Upgrade"),
        ("Upgrade: TLS/1.2, TLS/1.1", "Connection: keep-alive, Upgrade"),
        ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Upgrade: websocket", "Connection: Upgrade"),
    ],
    ids=["TLS", "several", "h2c", "websocket"],
)
def test_offer_to_upgrade_is_ignored(stack: Stack, offer: tuple[str, ...]) -> None:
    """Apache HttpClient 5.4 makes the first one with every request."""
    with connect(stack) as connection:
        connection.sendall(post("1.1", BODY, "Host: llm.test", *offer))
        answer = read(connection, to_end=False)

    assert answer.line == "HTTP/1.1 200 OK"
    assert "upgrade" not in answer.headers
    assert json.loads(answer.body)["object"] == "text_completion"


def preflight(stack: Stack, path: str, **headers: str) -> httpx.Response:
    asked = {"origin": ORIGIN, "access-control-request-method": "POST", **headers}
    return stack.client.options(path, headers={name.replace("_", "-"): value for name, value in asked.items()})


def test_preflight_request_is_allowed_as_engines_allow_it(stack: Stack) -> None:
    """All pages, and all headers that they name: for browsers ``*`` leaves out ``authorization``."""
    named = "authorization, content-type, x-stainless-os"
    stack.forget()
    answer = preflight(stack, "/v1/chat/completions", access_control_request_headers=named)
    plain = preflight(stack, "/v1/models")
    engine = httpx.options(
        f"{stack.decodes[0].url}/v1/chat/completions",
        headers={
            "origin": ORIGIN,
            "access-control-request-method": "POST",
            "access-control-request-headers": named,
        },
    )

    assert (answer.status_code, plain.status_code) == (200, 200)
    for name in ("access-control-allow-origin", "access-control-allow-headers"):
        assert answer.headers[name] == engine.headers[name]
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert stack.received() == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        pytest.param("/v1/completions", BODY, 200, id="an engine's answer"),
        pytest.param("/v1/completions", b"{", 400, id="a refusal of the service"),
        pytest.param("/v2/nothing", b"{}", 404, id="an unknown path"),
        pytest.param("/v1/completions", [b'"', b"x" * (3 << 20)], 413, id="Envoy's own"),
    ],
)
def test_page_may_read_every_answer(stack: Stack, path: str, body: bytes | list[bytes], status: int) -> None:
    """A browser shows a page nothing of an answer without these headers, not even its status."""
    headers = {"origin": ORIGIN, "content-type": "application/json"}
    answer = stack.client.post(path, content=body, headers=headers)

    assert answer.status_code == status
    assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]


def test_refusal_of_envoy_itself_has_a_line_in_its_log(stack: Stack) -> None:
    """It has the details; answers that come from further on have no second line."""
    with connect(stack) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\nx-large: %b\r\n\r\n" % (b"x" * 70_000))
        assert read(connection, to_end=True).line == "HTTP/1.1 431 Request Header Fields Too Large"
    with connect(stack) as connection:
        connection.sendall(post("1.1", BODY, "Host: a", f"Origin: {ORIGIN}", "x-request-id: stopped")[:-1])
        stopped = read(connection, to_end=True)
    stack.client.post("/v2/nothing", headers={"x-request-id": "from-further-on"})

    def lines() -> list[dict[str, Any]]:
        return [line for line in stack.envoy.access_log() if line["leg"] == "front_door"]

    assert len(stack.envoy.wait_for_access_log("from-further-on")) == 1
    wait_for(lambda: len(lines()) >= 2)
    assert stopped.line == "HTTP/1.1 408 Request Timeout"
    assert stopped.headers["access-control-allow-origin"] == ORIGIN
    assert {each["status"]: each["response_code_details"] for each in lines()} == {
        431: "http1.headers_too_large",
        408: "request_overall_timeout",
    }
    assert all(each["client"] == "127.0.0.1" for each in lines())
    assert [each["request_id"] for each in lines() if each["status"] == 408] == ["stopped"]
