"""A piece of a response becomes its reply without being parsed, and every other message is left to the parser."""

from collections.abc import Sequence
from typing import Any

import pytest
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from hypothesis import given
from hypothesis import strategies as some

from dp_extproc.attempt.events import Phase, StreamedChunk
from dp_extproc.engines.model import Role
from dp_extproc.extproc.codec import write_reply
from dp_extproc.extproc.pieces import pass_piece
from extproc.wire import request_body, request_headers, response_body, response_headers, response_trailers, run_server
from fleet_fixtures import Fleet, make_facts

DUPLEX = Mode.FULL_DUPLEX_STREAMED
FAR_FIELD = bytes((0xFA, 0x7F, 3)) + b"new"
"""Field 2047 with three bytes: one that a later version may have."""


def piece(data: bytes, *, end: bool = False, **beside: Any) -> bytes:
    message = ProcessingRequest(**beside)
    message.response_body.body = data
    message.response_body.end_of_stream = end
    return bytes(message.SerializeToString())


def metadata() -> dict[str, Any]:
    message = ProcessingRequest()
    message.metadata_context.filter_metadata["envoy.lb"].fields["x"].string_value = "y" * 300
    message.attributes["envoy.filters.http.ext_proc"].fields["request.id"].string_value = "z"
    return {"metadata_context": message.metadata_context, "attributes": dict(message.attributes)}


@given(
    data=some.one_of(some.binary(max_size=300), some.sampled_from([127, 128, 16_000, 16_384, 70_000]).map(bytes)),
    end=some.booleans(),
    beside=some.sampled_from([{}, {"observability_mode": True}, metadata()]),
)
def test_a_piece_has_the_reply_that_parsing_gives(data: bytes, end: bool, beside: dict[str, Any]) -> None:
    """The reply is the same, byte for byte, as the one that is made of the parsed message."""
    expected = StreamedChunk(Phase.RESPONSE_BODY, data, end)

    assert pass_piece(piece(data, end=end, **beside)) == write_reply(expected)
    assert pass_piece(piece(data, end=end, **beside) + FAR_FIELD) == write_reply(expected)


def test_a_piece_keeps_what_belongs_to_grpc_messages() -> None:
    """Gateways that cut bodies into gRPC messages expect these fields back, and later ones under equal numbers."""
    message = ProcessingRequest()
    message.response_body.body = b"x"
    message.response_body.grpc_message_compressed = True
    reply = pass_piece(message.SerializeToString())
    assert reply is not None
    found = ProcessingResponse.FromString(reply).response_body.response.body_mutation.streamed_response

    assert (found.body, found.grpc_message_compressed, found.end_of_stream_without_message) == (b"x", True, False)


def _others() -> dict[str, bytes]:
    found = {"nothing": b"", "metadata alone": ProcessingRequest(**metadata()).SerializeToString()}
    for name in ("request_headers", "response_headers", "request_body", "request_trailers", "response_trailers"):
        message = ProcessingRequest()
        getattr(message, name).SetInParent()
        found[name] = message.SerializeToString()
        # The last one of two kinds counts.
        found[f"a piece and then {name}"] = piece(b"x") + found[name]
    found["two pieces in one message, which are merged"] = piece(b"x") + piece(b"", end=True)
    found["an endless number"] = piece(b"x")[:1] + b"\xff" * (1 << 20)
    found["an endless key"] = piece(b"x") + b"\xff" * (1 << 20)
    found["a field of fixed size"] = piece(b"x") + bytes((0xF9, 0x7F)) + bytes(8)
    return found


OTHERS = _others()


@pytest.mark.parametrize("message", OTHERS.values(), ids=OTHERS)
def test_another_message_is_left_to_the_parser(message: bytes) -> None:
    """What is no single piece of a response is none here."""
    assert pass_piece(message) is None


@pytest.mark.parametrize("whole", [piece(b"x" * 200, **metadata()), piece(b"x" * 300)], ids=["beside", "alone"])
def test_a_message_that_is_cut_off_is_left_to_the_parser(whole: bytes) -> None:
    """A beginning of a message passes only where it is a whole message in itself."""
    passed = [at for at in range(len(whole)) if pass_piece(whole[:at]) is not None]

    assert [ProcessingRequest.FromString(whole[:at]).WhichOneof("request") for at in passed] == (
        ["response_body"] * len(passed)
    )
    assert len(passed) < 3


def events(count: int) -> Sequence[bytes]:
    return [b"data: %d%s\n\n" % (number, b"." * (number * 37 % 300)) for number in range(count)]


@pytest.mark.parametrize("trailers", [False, True], ids=["", "trailers"])
def test_a_stream_in_full_duplex_arrives_whole_and_in_order(*, trailers: bool) -> None:
    """Head, pieces and end have their replies in order, whether they are parsed or not."""
    sent = events(200)
    with run_server(Fleet(workers=[make_facts(Role.WORKER)]).scheduler, picks=True) as server:
        stream = server.stream()
        stream.send(
            request_headers(mode=DUPLEX, response_mode=DUPLEX),
            request_body(b'{"prompt":"hello"}'),
            response_headers(),
            *(response_body(each, end=False) for each in sent),
            response_trailers() if trailers else response_body(b"", end=True),
        )
        replies = stream.close()
        assert server.watcher.closed == server.watcher.opened

    chunks = [each.response_body.response.body_mutation.streamed_response for each in replies if each.response_body]
    assert [each.body for each in chunks] == ([*sent] if trailers else [*sent, b""])
    assert [each.end_of_stream for each in chunks] == [False] * len(sent) + ([] if trailers else [True])
    assert [each.response_trailers is not None for each in replies][-1] is trailers
    assert replies[2].response_headers is not None
