"""The endpoint-picker protocol on the wire: what a gateway sends, and what it is to get back.

The documented cases of the Gateway API Inference Extension (proposal 004) and of its pickers, as tables. Left out: the
test header by which a request names its own endpoint, as no client may; a generated ``x-request-id`` and trace context,
which the gateway's Envoy makes; several endpoints in one pick, as a body is written for one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest
from envoy_data_plane.envoy.config.core.v3 import Metadata
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from envoy_data_plane.envoy.service.ext_proc.v3 import ProcessingRequest
from envoy_data_plane.google.protobuf import ListValue, Struct, Value

from dp_extproc import contract
from dp_extproc.attempt.replies import CHUNK_BYTES
from dp_extproc.config import LoadSignal
from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.engines.model import Kind, Role
from extproc.wire import (
    GET,
    POST,
    Answer,
    Server,
    headers_of,
    kind_of,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    run_server,
)
from fleet_fixtures import Fleet, make_endpoint, make_facts

DUPLEX, BUFFERED = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED
FIRST, SECOND, SIXTH = "10.0.0.1:33001", "10.0.0.2:33002", "[2001:db8::1]:33003"
BODY = b'{"prompt":"hello"}'
EMBEDDINGS = {**POST, ":path": "/v1/embeddings"}
PACKED = {**POST, "content-encoding": "gzip"}
EVIL = {contract.DESTINATION: "6.6.6.6:6", "x-dp-decode-host": "6.6.6.6:6", "x-data-parallel-rank": "9"}
"""What a client may send to choose for itself."""


@dataclass(frozen=True)
class Said:
    """A reply, without what differs from run to run."""

    kind: str
    sets: dict[str, bytes] = field(default_factory=dict)
    removes: frozenset[str] = frozenset()
    chunk: tuple[bytes, bool] | None = None
    """Of a duplex body: data, and whether it is the last."""
    body: bytes | None = None
    """Of a buffered one."""
    destination: str | None = None
    """In the metadata of ``envoy.lb``."""
    clears_route: bool = False
    status: int | None = None
    """Of an immediate response."""


def said(message: Answer) -> Said:
    """Read a reply."""
    kind = kind_of(message)
    metadata = message.dynamic_metadata.to_dict() if message.dynamic_metadata else {}
    destination = metadata.get(contract.LB_NAMESPACE, {}).get(contract.DESTINATION)
    answer = getattr(message, kind)
    if kind == "immediate_response":
        return Said(kind, destination=destination, status=int(answer.status.code))
    common = getattr(answer, "response", None)
    mutation = common and common.header_mutation
    body = common and common.body_mutation
    streamed = body and body.streamed_response
    return Said(
        kind,
        headers_of(message) if common else {},
        frozenset(mutation.remove_headers if mutation else ()),
        (streamed.body, streamed.end_of_stream) if streamed else None,
        body.body if body and not streamed else None,
        destination,
        bool(common and common.clear_route_cache),
    )


def picked(endpoint: str, *removes: str, phase: str = "request_headers", **more: Any) -> Said:
    """The reply that routes: header and metadata say the same (15), and the route cache is cleared (10)."""
    sets = {contract.DESTINATION: endpoint.encode(), **more.pop("sets", {})}
    return Said(phase, sets, frozenset(removes), destination=endpoint, clears_route=True, **more)


def chunk(data: bytes, *, last: bool) -> Said:
    return Said("request_body", chunk=(data, last))


def refused(status: int) -> Said:
    """17: no endpoint is picked, so none is named."""
    return Said("immediate_response", status=status)


def hint(
    *values: Any, key: str = contract.DESTINATION_SUBSET, namespace: str = contract.SUBSET_NAMESPACE
) -> dict[str, Any]:
    """Make the metadata of a subset hint: a list of texts, or a single value of any other kind."""
    if len(values) == 1 and isinstance(values[0], Value):
        value = values[0]
    else:
        value = Value(list_value=ListValue(values=[Value(string_value=each) for each in values]))
    return {"metadata_context": Metadata(filter_metadata={namespace: Struct(fields={key: value})})}


def text(value: str) -> Value:
    return Value(string_value=value)


def make_fleet(*addresses: str) -> Fleet:
    """Workers at these addresses, of one rank each, so that it is known."""
    fleet = Fleet(workers=[make_facts(Role.WORKER, ranks=1) for _ in addresses])
    for number, address in enumerate(addresses, start=1):
        endpoint = make_endpoint(Role.WORKER, number)
        fleet.load.discovered(endpoint, address, fleet.endpoint(Role.WORKER, number).facts, fleet.clock())
    return fleet


@pytest.fixture
def server() -> Iterator[Server]:
    """One worker, so that it is known who is picked."""
    with run_server(make_fleet(FIRST).scheduler, picks=True, max_body=4 * CHUNK_BYTES) as server:
        yield server


@pytest.fixture
def several() -> Iterator[Server]:
    """Three workers, one with an IPv6 address."""
    with run_server(make_fleet(FIRST, SECOND, SIXTH).scheduler, picks=True) as server:
        yield server


WITH_RANK: Final = b'{"routed_dp_rank":0,"prompt":"hello"}'


def padded(length: int) -> bytes:
    """Make a body that is so long once it names its rank."""
    return b'{"prompt":"%b"}' % (b"x" * (length - len(b'{"routed_dp_rank":0,"prompt":""}')))


def rewritten(body: bytes) -> bytes:
    return b'{"routed_dp_rank":0,' + body[1:]


LONG = padded(CHUNK_BYTES + 1)

DUPLEX_CASES: Final[dict[str, tuple[Sequence[ProcessingRequest], Sequence[Said]]]] = {
    "02 headers, then the body": (
        [request_headers(mode=DUPLEX), request_body(BODY)],
        [picked(FIRST), chunk(WITH_RANK, last=True)],
    ),
    "17 a client's own choice is replaced, its other headers go": (
        [request_headers({**POST, **EVIL}, mode=DUPLEX), request_body(BODY)],
        [picked(FIRST, "x-dp-decode-host", "x-data-parallel-rank"), chunk(WITH_RANK, last=True)],
    ),
    "17 a refusal names no endpoint": (
        [request_headers({**POST, **EVIL}, mode=DUPLEX), request_body(b"[]")],
        [refused(400)],
    ),
    "18 a request id is the gateway's": (
        [request_headers({**POST, "x-request-id": "abc"}, mode=DUPLEX), request_body(BODY)],
        [picked(FIRST), chunk(WITH_RANK, last=True)],
    ),
    "21 a body of no length": ([request_headers(mode=DUPLEX), request_body(b"")], [refused(400)]),
    "21 a body of no length that is not read": (
        [request_headers(EMBEDDINGS, mode=DUPLEX), request_body(b"")],
        [picked(FIRST), chunk(b"", last=True)],
    ),
    "21 at the limit of a chunk": (
        [request_headers(mode=DUPLEX), request_body(padded(CHUNK_BYTES))],
        [picked(FIRST), chunk(rewritten(padded(CHUNK_BYTES)), last=True)],
    ),
    "21 one byte more": (
        [request_headers(mode=DUPLEX), request_body(LONG)],
        [picked(FIRST), chunk(rewritten(LONG)[:CHUNK_BYTES], last=False), chunk(b"}", last=True)],
    ),
    "22 trailers": (
        [request_headers(mode=DUPLEX), request_body(BODY, end=False), request_trailers()],
        [picked(FIRST), chunk(WITH_RANK, last=False), Said("request_trailers")],
    ),
    "23 a body in pieces": (
        [request_headers(mode=DUPLEX), *(request_body(BODY[at : at + 1], end=False) for at in range(len(BODY))),
         request_body(b"")],
        [picked(FIRST), chunk(WITH_RANK, last=True)],
    ),
    "26 no body at all": ([request_headers(GET, end=True, mode=DUPLEX)], [picked(FIRST)]),
    "26 models are any server's": (
        [request_headers({**GET, ":path": "/v1/models"}, end=True, mode=DUPLEX)],
        [picked(FIRST)],
    ),
    "27 another path, in pieces": (
        [request_headers(EMBEDDINGS, mode=DUPLEX), request_body(b'{"in', end=False), request_body(b'put":""}')],
        [picked(FIRST), chunk(b'{"in', last=False), chunk(b'put":""}', last=True)],
    ),
    "28 too large": (
        [request_headers({**POST, "content-length": str(1 << 40)}, mode=DUPLEX)],
        [refused(413)],
    ),
    "29 compressed": (
        [request_headers(PACKED, mode=DUPLEX), request_body(b"\x1f\x8b")],
        [picked(FIRST), chunk(b"\x1f\x8b", last=True)],
    ),
    "39 the response passes": (
        [request_headers(GET, end=True, mode=DUPLEX), response_headers(), response_body(b"{}", end=True),
         response_trailers()],
        [picked(FIRST), Said("response_headers"), Said("response_body"), Said("response_trailers")],
    ),
    "05 a stream that begins with the response": ([response_headers(503)], [Said("response_headers")]),
}  # fmt: skip


@pytest.mark.parametrize(("sent", "expected"), DUPLEX_CASES.values(), ids=DUPLEX_CASES)
def test_in_duplex(server: Server, sent: Sequence[ProcessingRequest], expected: Sequence[Said]) -> None:
    """What the gateway gets back, in order."""
    stream = server.stream()
    stream.send(*sent)

    assert [said(message) for message in stream.close()] == list(expected)


LENGTH = {"content-length": str(len(WITH_RANK)).encode()}
CONTINUED = Said("request_headers")

BUFFERED_CASES: Final[dict[str, tuple[Sequence[ProcessingRequest], Sequence[Said]]]] = {
    "09 the pick goes with the body": (
        [request_headers(mode=BUFFERED), request_body(BODY), response_headers()],
        [CONTINUED, picked(FIRST, phase="request_body", sets=LENGTH, body=WITH_RANK), Said("response_headers")],
    ),
    "17 a client's own choice goes before anything else": (
        [request_headers({**POST, **EVIL}, mode=BUFFERED), request_body(BODY)],
        [
            Said("request_headers", removes=frozenset(EVIL)),
            picked(FIRST, phase="request_body", sets=LENGTH, body=WITH_RANK),
        ],
    ),
    "17 and stays gone with a refusal": (
        [request_headers({**POST, **EVIL}, mode=BUFFERED), request_body(b"[]")],
        [Said("request_headers", removes=frozenset(EVIL)), refused(400)],
    ),
    "21 a body of no length": ([request_headers(mode=BUFFERED), request_body(b"")], [CONTINUED, refused(400)]),
    "26 no body at all": ([request_headers(GET, end=True, mode=BUFFERED)], [picked(FIRST)]),
    "27 another path": (
        [request_headers(EMBEDDINGS, mode=BUFFERED), request_body(b"{}")],
        [picked(FIRST), Said("request_body")],
    ),
}


@pytest.mark.parametrize(("sent", "expected"), BUFFERED_CASES.values(), ids=BUFFERED_CASES)
def test_in_lock_step(server: Server, sent: Sequence[ProcessingRequest], expected: Sequence[Said]) -> None:
    """One reply to each message."""
    stream = server.stream()

    assert [said(stream.ask(message)) for message in sent] == list(expected)


ANYBODY = {FIRST, SECOND, SIXTH}
ONE = {SECOND}

HINTS: Final[dict[str, tuple[dict[str, Any], set[str]]]] = {
    "a list": (hint(SECOND, "10.9.9.9:1"), ONE),
    "a text": (hint(text(SECOND)), ONE),
    "a text with commas and spaces": (hint(text(f" 10.9.9.9:1 , {SECOND} ")), ONE),
    "a list of texts with commas": (hint(f"10.9.9.9:1,{SECOND}", ""), ONE),
    "an address for all its ports": (hint("10.0.0.2"), ONE),
    "19 IPv6 in brackets": (hint(SIXTH), {SIXTH}),
    "IPv6 for all its ports": (hint("2001:db8::1"), {SIXTH}),
    "several": (hint(FIRST, SECOND), {FIRST, SECOND}),
    "another port": (hint("10.0.0.2:1"), set()),
    "none of the pool": (hint("10.9.9.9:1"), set()),
    "an empty list": (hint(), set()),
    "an empty text": (hint(text("")), set()),
    "neither list nor text": (hint(Value(number_value=7.0)), set()),
    "another key of the namespace": (hint(SECOND, key="other"), ANYBODY),
    "another namespace": (hint(SECOND, namespace="envoy.lb"), ANYBODY),
    "none": ({}, ANYBODY),
}


@pytest.mark.parametrize("headers", [POST, EMBEDDINGS], ids=["read", "not read"])
@pytest.mark.parametrize(("metadata", "allowed"), HINTS.values(), ids=HINTS)
def test_30_subset_hints(several: Server, headers: dict[str, str], metadata: dict[str, Any], allowed: set[str]) -> None:
    """Only endpoints of the hint are picked; if none of them is fresh, the answer is 503."""
    found = set()
    for _ in range(60 if len(allowed) > 1 else 3):
        stream = several.stream()
        stream.send(request_headers(headers, mode=DUPLEX, **metadata), request_body(BODY))
        first = said(stream.close()[0])
        if not allowed:
            assert first == refused(503)
        else:
            assert first.destination is not None
            found.add(first.destination)
        if found == allowed and allowed:
            break

    assert found == allowed


def test_15_the_rank_of_a_vllm_server_goes_into_a_header() -> None:
    """And the body stays as it is."""
    facts = replace(make_facts(Role.WORKER, (0, 11, 0), 2), kind=Kind.VLLM)
    with run_server(Fleet(workers=[facts]).scheduler, picks=True) as server:
        stream = server.stream()
        stream.send(request_headers(mode=DUPLEX), request_body(BODY))
        head, body = map(said, stream.close())

    assert head.sets[contract.DESTINATION] == FIRST.encode()
    assert head.sets["x-data-parallel-rank"] in {b"0", b"1"}
    assert body == chunk(BODY, last=True)


def test_31_request_is_refused_without_fresh_endpoints() -> None:
    """503, also for what is not read."""
    fleet = make_fleet(FIRST)
    fleet.load.update((), 5.0)
    with run_server(fleet.scheduler, picks=True) as server:
        for headers in (POST, EMBEDDINGS, GET):
            stream = server.stream()
            stream.send(request_headers(headers, mode=DUPLEX), request_body(BODY))
            assert [said(message) for message in stream.close()] == [refused(503)]


def test_31_request_is_refused_when_all_endpoints_are_full() -> None:
    """429, with the time to wait."""
    fleet = make_fleet(FIRST)
    fleet.scheduler.configure([fleet.pool], LoadSignal.ESTIMATE, AdmissionSettings(max_requests=1))
    with run_server(fleet.scheduler, picks=True) as server:
        busy = server.stream()
        busy.send(request_headers(mode=DUPLEX), request_body(BODY))
        assert said(busy.receive()).destination == FIRST
        stream = server.stream()
        stream.send(request_headers(mode=DUPLEX), request_body(BODY))
        (answer,) = stream.close()

    assert said(answer) == refused(429)
    assert headers_of(answer)["retry-after"] == b"1"


@pytest.mark.parametrize(
    ("served", "counted"),
    [(FIRST, 0), (SECOND, 1), ("", 0), (None, 0)],
    ids=["the pick", "another", "none", "not reported"],
)
def test_40_other_endpoint_than_the_pick_is_counted(server: Server, served: str | None, counted: int) -> None:
    """The gateway's word for another endpoint than the pick is counted, and nothing else."""
    reported = (
        {} if served is None else hint(text(served), key=contract.DESTINATION_SERVED, namespace=contract.LB_NAMESPACE)
    )
    stream = server.stream()
    stream.send(request_headers(mode=DUPLEX), request_body(BODY), response_headers(**reported))

    assert said(stream.close()[-1]) == Said("response_headers")
    assert server.watcher.elsewhere == counted
