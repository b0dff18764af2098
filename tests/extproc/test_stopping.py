"""Which streams end in good order before the process does, and which must not, as that would lose data."""

from collections.abc import Iterator, Sequence

import grpc
import pytest
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from envoy_data_plane.envoy.service.ext_proc.v3 import ProcessingRequest

from dp_extproc.engines.model import Role
from extproc.wire import (
    GET,
    POST,
    Server,
    Stream,
    kind_of,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    run_server,
)
from fleet_fixtures import Fleet, make_facts

DUPLEX, BUFFERED, NONE = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED, Mode.NONE
BODY = b'{"prompt":"hello"}'
EMBEDDINGS = {**POST, ":path": "/v1/embeddings"}
HEAD = response_headers()


@pytest.fixture(params=["own", "picks"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with run_server(Fleet(workers=[make_facts(Role.WORKER)]).scheduler, picks=request.param == "picks") as server:
        yield server


@pytest.fixture
def picker() -> Iterator[Server]:
    with run_server(Fleet(workers=[make_facts(Role.WORKER)]).scheduler, picks=True) as server:
        yield server


def begin(server: Server, sent: Sequence[ProcessingRequest], answers: int) -> Stream:
    """Open a stream that has come so far."""
    stream = server.stream()
    stream.send(*sent)
    for _ in range(answers):
        stream.receive()
    return stream


def has_ended(stream: Stream) -> bool:
    """Tell whether a stream has ended with status OK: then nothing is to come, whatever Envoy does."""
    assert list(stream.call) == []
    return stream.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        pytest.param([request_headers(mode=BUFFERED), request_body(BODY), HEAD], 3, id="buffered"),
        pytest.param([request_headers(mode=DUPLEX), request_body(BODY), HEAD], 3, id="duplex"),
        pytest.param(
            [request_headers(mode=DUPLEX), request_body(BODY, end=False), request_trailers(), HEAD], 4, id="trailers"
        ),
        pytest.param([request_headers(GET, end=True, mode=DUPLEX), HEAD], 2, id="no body"),
    ],
)
def test_stream_ends_at_a_stop_when_its_response_has_begun(
    server: Server, sent: Sequence[ProcessingRequest], answers: int
) -> None:
    """Nothing of the answer's body comes here, so Envoy lets it pass."""
    stream = begin(server, sent, answers)

    server.leave()

    assert has_ended(stream)
    assert server.watcher.opened == server.watcher.closed == 1


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
def test_stream_of_a_picked_request_ends_at_a_stop(picker: Server, mode: Mode) -> None:
    """Nothing is said on it any more but that its answer may pass, which goes without saying."""
    stream = begin(picker, [request_headers(mode=mode), request_body(BODY)], 2)

    picker.leave()

    assert has_ended(stream)


@pytest.mark.parametrize("picks", [False, True], ids=["own", "picks"])
def test_stream_ends_after_a_stop_as_soon_as_it_can(picks: bool) -> None:
    """Also what is still said while the process is about to end; our own protocol waits for the answer's head."""
    with run_server(Fleet(workers=[make_facts(Role.WORKER)]).scheduler, picks=picks) as server:
        stream = begin(server, [request_headers(mode=BUFFERED)], 1)
        server.leave()
        assert kind_of(stream.ask(request_body(BODY))) == "request_body"
        if not picks:
            assert kind_of(stream.ask(HEAD)) == "response_headers"

        assert has_ended(stream)


STAYING = {
    "response in duplex": [request_headers(mode=DUPLEX, response_mode=DUPLEX), request_body(BODY), HEAD],
    "response in pieces": [request_headers(mode=BUFFERED, response_mode=Mode.STREAMED), request_body(BODY), HEAD],
    "response as a whole": [request_headers(mode=BUFFERED, response_mode=BUFFERED), request_body(BODY), HEAD],
    "not said how": [request_headers(), request_body(BODY), HEAD],
}
"""Answers that have begun, whose bodies are on their way here, or may be."""


@pytest.mark.parametrize("sent", STAYING.values(), ids=STAYING)
def test_stream_stays_open_when_a_response_body_may_be_on_its_way(
    server: Server, sent: Sequence[ProcessingRequest]
) -> None:
    """Envoy loses what it has sent here and got no reply to, and calls it a success."""
    stream = begin(server, sent, 3)

    server.leave()

    assert kind_of(stream.ask(response_trailers())) == "response_trailers"
    assert stream.close() == []


def test_stream_stays_open_when_a_request_body_is_on_its_way(picker: Server) -> None:
    """An engine may answer before it has read a request; the pieces that are on their way here would be lost."""
    sent = [request_headers(EMBEDDINGS, mode=DUPLEX), request_body(b"{", end=False), HEAD]
    stream = begin(picker, sent, 3)

    picker.leave()

    assert kind_of(stream.ask(request_body(b"", end=False))) == "request_body"
    stream.ask(request_body(b"}"))
    assert has_ended(stream)


def test_stream_stays_open_when_the_text_of_an_error_was_asked_for() -> None:
    """With the bundled Envoy the service reads the text of a failure; until then nothing has passed."""
    with run_server(Fleet(workers=[make_facts(Role.WORKER)]).scheduler) as server:
        stream = begin(server, [request_headers(mode=BUFFERED), request_body(BODY), response_headers(500)], 3)
        server.leave()

        text = response_body(b'{"error":{}}', end=False)
        assert kind_of(stream.ask(text)) == "response_body"
        assert kind_of(stream.ask(response_trailers())) == "response_trailers"
        assert stream.close() == []
