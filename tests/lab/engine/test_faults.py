"""The faults that can be switched on, as a client and as the engine's journal see them."""

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
    """An engine without faults and memories."""
    server.forget()
    yield server
    server.heal()


def generate(engine: EngineProcess, *, stream: bool = False, timeout: float = 5.0) -> httpx.Response:
    return httpx.post(f"{engine.url}/generate", json={**REQUEST, "stream": stream}, timeout=timeout)


def journal(engine: EngineProcess) -> dict[str, Any]:
    (record,) = engine.requests()
    return record


@pytest.mark.parametrize("status", ["400", "500", "503"])
def test_statuses(engine: EngineProcess, status: str) -> None:
    """An engine answers a status without having done anything."""
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
def test_broken_answers(engine: EngineProcess, fault: dict[str, Any], error: type[Exception], *, stream: bool) -> None:
    """A client gets no (whole) answer, and the engine's journal knows who ended it."""
    hangs = fault["kind"] == "hang"
    engine.fault(inference=fault)
    with pytest.raises(error):
        generate(engine, stream=stream, timeout=0.5 if hangs else 10.0)
    if hangs:
        wait_for(lambda: journal(engine)["disconnected_at"])
        assert journal(engine)["outcome"] in {"aborted", "finished"}
    else:
        assert journal(engine)["disconnected_at"] is None


def test_an_answer_that_is_too_long(engine: EngineProcess) -> None:
    """What belongs to it comes, and after that something else, and the end of the connection."""
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


def test_chunks_before_a_reset(engine: EngineProcess) -> None:
    """A reset in mid-stream comes after as many events as were asked for."""
    engine.fault(inference={"kind": "reset", "after": 3})
    events: list[str] = []
    with (
        httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}) as answer,
        pytest.raises(httpx.ReadError),
    ):
        events.extend(line for line in answer.iter_lines() if line)
    assert len(events) == 3


def test_a_pause_in_mid_stream(engine: EngineProcess) -> None:
    """A slow engine pauses after the chunks that were asked for, and then goes on."""
    engine.fault(inference={"kind": "slow", "after": 1, "seconds": 0.3})
    began = time.monotonic()
    assert generate(engine, stream=True).text.count("data: ") == 9
    assert time.monotonic() - began >= 0.3


def test_a_slow_answer(engine: EngineProcess) -> None:
    """A slow engine answers late, but right."""
    engine.fault(inference={"kind": "slow", "seconds": 0.3})
    began = time.monotonic()
    assert generate(engine).status_code == 200
    assert time.monotonic() - began >= 0.3


def test_only_the_next_requests(engine: EngineProcess) -> None:
    """A fault can go away after a number of requests."""
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
def test_failures_of_the_scheduler(engine: EngineProcess, path: str, body: dict[str, Any], sign: str) -> None:
    """A request that its scheduler gives up is a 500, or in a stream an event behind status 200."""
    engine.fault(inference="fail")
    assert httpx.post(engine.url + path, json=body).status_code == 500
    answer = httpx.post(engine.url + path, json={**body, "stream": True})
    assert answer.status_code == 200
    assert sign in answer.text


def test_a_failure_after_some_tokens(engine: EngineProcess) -> None:
    """A scheduler can give up a request of which the client has seen something."""
    engine.fault(inference={"kind": "fail", "after": 3})
    events = [line for line in generate(engine, stream=True).text.splitlines() if line]
    assert '"abort"' not in events[2]
    assert '"abort"' in events[-2]


def test_a_closed_port(engine: EngineProcess) -> None:
    """An engine can refuse connections, and cut those that are open, without being gone."""
    with loopback.client() as client:
        assert client.get(f"{engine.url}/v1/models").status_code == 200
        engine.fault(inference="refuse")
        with pytest.raises(httpx.TransportError):
            client.get(f"{engine.url}/v1/models")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{engine.url}/v1/models")
        engine.fault(inference="ok")
        assert client.get(f"{engine.url}/v1/models").status_code == 200


def test_the_bootstrap_port() -> None:
    """The bootstrap port has faults of its own; the API port does not notice."""
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


def test_a_client_that_leaves(engine: EngineProcess) -> None:
    """The journal tells at once when a client has cut a stream, long before SGLang's own look after it."""
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
def test_faults_that_do_not_exist(engine: EngineProcess, faults: dict[str, Any]) -> None:
    """A wrong switch is refused with the reason, and changes nothing."""
    answer = httpx.post(f"{engine.debug_url}/faults", json=faults)
    assert answer.status_code == 400
    assert answer.text
    assert httpx.get(f"{engine.debug_url}/faults").json() == {}


def test_a_flood_comes_before_the_first_event(engine: EngineProcess) -> None:
    """As many bytes of it as were asked for; whole answers have no place for it."""
    engine.fault(inference={"kind": "flood", "text": ": wait\n\n", "size": 200_000})
    streamed = generate(engine, stream=True).text
    flood, rest = streamed[:200_000], streamed[200_000:]

    assert set(flood.split("\n\n")) == {": wait", ""}
    assert rest.startswith("data: {")
    assert rest.endswith("data: [DONE]\n\n")
    assert "text" in generate(engine).json()


def test_a_flood_without_an_end_stops_when_its_client_leaves(engine: EngineProcess) -> None:
    """Or when it is switched off: then the answer comes."""
    engine.fault(inference={"kind": "flood"})
    with httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}, timeout=5.0) as answer:
        next(answer.iter_raw())
    wait_for(lambda: journal(engine)["disconnected_at"])

    with httpx.stream("POST", f"{engine.url}/generate", json={**REQUEST, "stream": True}, timeout=5.0) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        engine.heal()
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_a_flood_needs_a_text(engine: EngineProcess) -> None:
    """Or it would be none."""
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        engine.fault(inference={"kind": "flood", "text": ""})
