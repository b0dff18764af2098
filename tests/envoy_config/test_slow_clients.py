"""Clients that send a request slowly, and engines that respond slowly."""

import json
import socket
from collections.abc import Iterator

import pytest

from dp_extproc.config import BodyMode
from envoy_config.harness import Bench, run_bench

BEGUN = {
    "headers": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n",
    "body": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{",
    "chunks": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
}


@pytest.fixture(scope="module", params=[BodyMode.BUFFERED, BodyMode.FULL_DUPLEX_STREAMED])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """An Envoy with short timeouts for headers and requests."""
    with run_bench(request.param, request_headers_timeout="500ms", request_timeout="1s") as bench:
        yield bench


def begin(bench: Bench, part: str) -> tuple[bytes, bytes]:
    """Stop in the middle of a request, and read Envoy's response until it closes the connection."""
    inference = bench.config.envoy.inference
    answer = b""
    with socket.create_connection((inference.host, inference.port), timeout=30) as client:
        client.sendall(BEGUN[part])
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], body


@pytest.mark.parametrize("part", BEGUN)
def test_client_gets_a_408_if_it_stops_within_a_request(bench: Bench, part: str) -> None:
    """The error has the shape of all others, and the connection and its buffers are released."""
    status, body = begin(bench, part)

    assert status == b"HTTP/1.1 408 Request Timeout"
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_request_timeout_does_not_end_a_slow_response(bench: Bench) -> None:
    """A stream still runs when another request, which began later, has reached its timeout."""
    with bench.client.stream("GET", "/stream") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"first"
        begin(bench, "body")
        bench.decode.may_finish.set()

        assert b"".join(chunks) == b"last"
