"""Clients that take their time to ask, and servers that take theirs to answer."""

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
    """An Envoy without much patience."""
    with run_bench(request.param, request_headers_timeout="500ms", request_timeout="1s") as bench:
        yield bench


def begin(bench: Bench, part: str) -> tuple[bytes, bytes]:
    """Stop in the middle of a request, and read what Envoy says to that until it closes."""
    inference = bench.config.envoy.inference
    answer = b""
    with socket.create_connection((inference.host, inference.port), timeout=30) as client:
        client.sendall(BEGUN[part])
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], body


@pytest.mark.parametrize("part", BEGUN)
def test_a_client_that_stops_in_the_middle_is_let_go(bench: Bench, part: str) -> None:
    """It gets a 408 like other errors, and what it held is free again."""
    status, body = begin(bench, part)

    assert status == b"HTTP/1.1 408 Request Timeout"
    assert json.loads(body)["error"]["code"] == "request_refused"


def test_an_answer_may_take_longer_than_the_request(bench: Bench) -> None:
    """It is not over before somebody has waited in vain for the rest of a request that was begun later."""
    with bench.client.stream("GET", "/stream") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"first"
        begin(bench, "body")
        bench.decode.may_finish.set()

        assert b"".join(chunks) == b"last"
