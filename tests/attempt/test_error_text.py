"""The text of an engine's error goes on as the client can read it, in each way in which Envoy sends it."""

import json

import pytest

from dp_extproc.attempt.error_text import MOST_BYTES, ErrorText, write_error
from dp_extproc.attempt.events import (
    BodyMode,
    Continue,
    Mutate,
    Phase,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamedChunk,
)
from dp_extproc.request.error_shapes import ErrorShape
from dp_extproc.response.renaming import Renames

ID = "dp0123456789abcdef01234567d"
FLAT = json.dumps({"message": f"Request {ID} at 10.0.0.1:3 exceeds", "type": "T", "param": None, "code": 400}).encode()
NO_ANSWER = b"upstream connect error or disconnect/reset before headers. reset reason: connection timeout"


@pytest.mark.parametrize("shape", ErrorShape)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(FLAT, "Request (id) at (address) exceeds", id="flat"),
        pytest.param(b'{"detail":"Not Found"}', "Not Found", id="FastAPI"),
        pytest.param(NO_ANSWER, "the engine did not answer: connection timeout", id="Envoy"),
    ],
)
def test_error_has_its_message_where_the_clients_of_its_path_read_it(
    shape: ErrorShape, text: bytes, message: str
) -> None:
    """Whoever has written it."""
    body = json.loads(write_error(text, 400, shape))
    assert body["error"]["message"] == message
    assert (body.get("type") == "error") is (shape is ErrorShape.ANTHROPIC)


def test_long_text_is_cut_and_still_says_how_it_begins() -> None:
    """Validation errors repeat the whole body of the request."""
    text = b'{"message":"1 error at n: ' + b"x " * MOST_BYTES + b'"}'
    body = json.loads(write_error(text, 400, ErrorShape.OPENAI))
    assert "1 error at n: x" in body["error"]["message"]
    assert len(body["error"]["message"]) < 3000


def test_id_of_the_client_takes_the_place_of_ours() -> None:
    """The client knows no other."""
    body = json.loads(write_error(FLAT, 400, ErrorShape.OPENAI, Renames(ID, (b"mine",), is_batch=False)))
    assert body["error"]["message"] == "Request mine at (address) exceeds"


def test_text_in_chunks_goes_on_as_one_behind_its_headers() -> None:
    """In full duplex no reply holds the headers, so they wait here."""
    error = ErrorText(ResponseHeaders(400), BodyMode.DUPLEX, is_sent=False, renames=None)
    assert error.ask() == ()
    assert not error.take(ResponseBody(FLAT[:9], False))
    assert error.take(ResponseBody(FLAT[9:], True))
    headers, chunk = error.pass_on((), (), ErrorShape.OPENAI)
    assert headers == Mutate(Phase.RESPONSE_HEADERS, set_headers=(("content-type", b"application/json"),))
    assert isinstance(chunk, StreamedChunk)
    assert chunk.end_of_stream
    assert json.loads(chunk.data)["error"]["message"] == "Request (id) at (address) exceeds"


def test_trailers_end_a_text_in_chunks() -> None:
    """They follow the text."""
    error = ErrorText(ResponseHeaders(400), BodyMode.DUPLEX, is_sent=False, renames=None)
    assert not error.take(ResponseBody(b"no", False))
    assert error.take(ResponseTrailers())
    assert list(error.pass_on((), (), ErrorShape.OPENAI)) == [
        Continue(Phase.RESPONSE_HEADERS),
        StreamedChunk(Phase.RESPONSE_BODY, b"no", end_of_stream=False),
        Continue(Phase.RESPONSE_TRAILERS),
    ]


@pytest.mark.parametrize("event", [ResponseHeaders(400, end_of_stream=True), ResponseHeaders(400, is_encoded=True)])
def test_text_that_cannot_be_read_is_not_awaited(event: ResponseHeaders) -> None:
    """There is none, or it is compressed."""
    assert not ErrorText(event, BodyMode.LOCKSTEP, is_sent=True, renames=None).is_readable
