"""Test the faults that can be switched on, as a client and as the engine's journal record them."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from patience import wait_for

REQUEST = {"text": "hello", "sampling_params": {"max_new_tokens": 8}}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[EngineProcess]:
    with EngineProcess("unified", 2, "--time-scale", "0.01") as engine:
        yield engine


@pytest.fixture
def engine(server: EngineProcess) -> Iterator[EngineProcess]:
    """Run an engine without faults and without requests in its journal."""
    server.forget()
    yield server
    server.heal()


def generate(engine: EngineProcess, *, stream: bool = False, timeout: float = 5.0) -> httpx.Response:
    return httpx.post(f"{engine.url}/generate", json={**REQUEST, "stream": stream}, timeout=timeout)


def journal(engine: EngineProcess) -> dict[str, Any]:
    (record,) = engine.requests()
    return record


@pytest.mark.parametrize("status", ["400", "500", "503"])
def test_fault_answers_a_status(engine: EngineProcess, status: str) -> None:
    """The engine has done nothing for it."""
    engine.fault(inference=status)
    assert generate(engine).status_code == int(status)
    record = journal(engine)
    assert (record["fault"], record["answer_status"], record["legs"]) == (status, int(status), [])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param({"kind": "reset"}, httpx.ReadError, id="reset before headers"),
        pytest.param({"kind": "reset", "after": 2}, httpx.ReadError, id="reset in mid-stream"),
        pytest.param({"kind": "noise"}, httpx.RemoteProtocolError, id="not HTTP"),
        pytest.param({"kind": "short"}, httpx.RemoteProtocolError, id="short body"),
        pytest.param({"kind": "hang"}, httpx.ReadTimeout, id="hang before headers"),
        pytest.param({"kind": "hang", "after": 2}, httpx.ReadTimeout, id="hang in mid-stream"),
    ],
)
def test_fault_breaks_an_answer(
    engine: EngineProcess, fault: dict[str, Any], error: type[Exception], *, stream: bool
) -> None:
    """A client gets no (whole) answer, and the journal has the reason."""
    hangs = fault["kind"] == "hang"
    engine.fault(inference=fault)
    with pytest.raises(error):
        generate(engine, stream=stream, timeout=0.5 if hangs else 10.0)
    if hangs:
        wait_for(lambda: journal(engine)["disconnected_at"])
        assert journal(engine)["outcome"] in {"aborted", "finished"}
    else:
        assert journal(engine)["disconnected_at"] is None


def test_long_answer_has_more_bytes(engine: EngineProcess) -> None:
    """The answer is complete, then other bytes come, and the end of the connection."""
    engine.fault(inference="long")
    with socket.create_connection(("127.0.0.1", engine.port), timeout=10) as client:
        body = json.dumps(REQUEST).encode()
        client.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = int(headers[b"content-length"])
    assert json.loads(rest[:length])["meta_info"]
    assert b"not HTTP" in rest[length:]


def test_reset_comes_after_the_wanted_chunks(engine: EngineProcess) -> None:
    """A reset in mid-stream comes after as many events as were wanted."""
    engine.fault(inference={"kind": "reset", "after": 3})
    events: list[str] = []
    with (
        httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}) as answer,
        pytest.raises(httpx.ReadError),
    ):
        events.extend(line for line in answer.iter_lines() if line)
    assert len(events) == 3


def test_slow_stream_pauses_after_the_wanted_chunks(engine: EngineProcess) -> None:
    """Then it goes on."""
    engine.fault(inference={"kind": "slow", "after": 1, "seconds": 0.3})
    began = time.monotonic()
    assert generate(engine, stream=True).text.count("data: ") == 9
    assert time.monotonic() - began >= 0.3


def test_slow_answer_is_late_but_right(engine: EngineProcess) -> None:
    """Nothing else is wrong with it."""
    engine.fault(inference={"kind": "slow", "seconds": 0.3})
    began = time.monotonic()
    assert generate(engine).status_code == 200
    assert time.monotonic() - began >= 0.3


def test_fault_ends_after_its_requests(engine: EngineProcess) -> None:
    """A fault can hit a number of requests."""
    engine.fault(inference={"kind": "500", "times": 2})
    assert [generate(engine).status_code for _ in range(3)] == [500, 500, 200]


@pytest.mark.parametrize(
    ("path", "body", "sign"),
    [
        pytest.param("/generate", REQUEST, '"finish_reason":{"type":"abort"', id="generate"),
        pytest.param("/v1/chat/completions", CHAT, '{"error":{"object":"error"', id="chat"),
        pytest.param("/v1/messages", CHAT, "event: error", id="messages"),
        pytest.param("/v1/responses", {"input": "hello"}, "response.failed", id="responses"),
    ],
)
def test_failed_request_is_a_500_or_an_event(engine: EngineProcess, path: str, body: dict[str, Any], sign: str) -> None:
    """In a stream it is an event behind status 200."""
    engine.fault(inference="fail")
    assert httpx.post(engine.url + path, json=body).status_code == 500
    answer = httpx.post(engine.url + path, json={**body, "stream": True})
    assert answer.status_code == 200
    assert sign in answer.text


def test_request_fails_after_some_tokens(engine: EngineProcess) -> None:
    """The client has part of the answer then."""
    engine.fault(inference={"kind": "fail", "after": 3})
    events = [line for line in generate(engine, stream=True).text.splitlines() if line]
    assert '"abort"' not in events[2]
    assert '"abort"' in events[-2]


def test_closed_port_refuses_connections(engine: EngineProcess) -> None:
    """Open connections are closed, and the engine still runs."""
    with loopback.client() as client:
        assert client.get(f"{engine.url}/v1/models").status_code == 200
        engine.fault(inference="refuse")
        with pytest.raises(httpx.TransportError):
            client.get(f"{engine.url}/v1/models")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{engine.url}/v1/models")
        engine.fault(inference="ok")
        assert client.get(f"{engine.url}/v1/models").status_code == 200


def test_bootstrap_port_has_faults_of_its_own() -> None:
    """The API port is not affected."""
    with EngineProcess("prefill", 2, "--time-scale", "0.01") as engine:
        url = f"http://127.0.0.1:{engine.bootstrap_port}/health"
        engine.fault(bootstrap="hang")
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(url, timeout=0.2)
        engine.fault(bootstrap="refuse")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        assert httpx.get(f"{engine.url}/v1/models").status_code == 200
        engine.fault(bootstrap="ok")
        assert httpx.get(url).status_code == 200


def test_journal_records_a_client_that_leaves(engine: EngineProcess) -> None:
    """It does so at once when a client closes a stream, long before SGLang's own check."""
    engine.fault(inference={"kind": "slow", "after": 1, "seconds": 60})
    with httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}) as answer:
        assert answer.status_code == 200
        assert journal(engine)["disconnected_at"] is None
    wait_for(lambda: journal(engine)["disconnected_at"])
    assert journal(engine)["answered_at"] is None


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param({"loads": "refuse"}, id="a page has no port"),
        pytest.param({"metrics": "fail"}, id="a page has no scheduler"),
        pytest.param({"nothing": "hang"}, id="no such page"),
        pytest.param({"inference": {"kind": "hang", "when": 1}}, id="no such field"),
    ],
)
def test_unknown_fault_is_refused(engine: EngineProcess, faults: dict[str, Any]) -> None:
    """The answer has the reason, and nothing changes."""
    answer = httpx.post(f"{engine.debug_url}/faults", json=faults)
    assert answer.status_code == 400
    assert answer.text
    assert httpx.get(f"{engine.debug_url}/faults").json() == {}


def test_flood_comes_before_the_first_event(engine: EngineProcess) -> None:
    """It has as many bytes as were wanted; whole answers have no place for it."""
    engine.fault(inference={"kind": "flood", "text": ": wait\n\n", "size": 200_000})
    streamed = generate(engine, stream=True).text
    flood, rest = streamed[:200_000], streamed[200_000:]

    assert set(flood.split("\n\n")) == {": wait", ""}
    assert rest.startswith("data: {")
    assert rest.endswith("data: [DONE]\n\n")
    assert "text" in generate(engine).json()


def test_endless_flood_stops_when_its_client_leaves(engine: EngineProcess) -> None:
    """It also stops when it is switched off: then the answer comes."""
    engine.fault(inference={"kind": "flood"})
    with httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}, timeout=5.0) as answer:
        next(answer.iter_raw())
    wait_for(lambda: journal(engine)["disconnected_at"])

    with httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}, timeout=5.0) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        engine.heal()
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_flood_refuses_an_empty_text(engine: EngineProcess) -> None:
    """It would have no bytes."""
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        engine.fault(inference={"kind": "flood", "text": ""})
