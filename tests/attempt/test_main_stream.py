"""The exchange as a state machine: whatever Envoy sends in whatever order, the protocol's rules hold."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attempt.attempts import Exchange
from dp_extproc import contract
from dp_extproc.attempt.attempt import ProtocolViolationError
from dp_extproc.attempt.events import (
    BodyMode,
    Continue,
    Event,
    ExtendTimeout,
    Immediate,
    Mutate,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamedChunk,
)
from dp_extproc.attempt.replies import CHUNK_BYTES
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.path import Passed
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api
from dp_extproc.scheduling.decision import Answer, Decision

MAX_BODY = 4 * CHUNK_BYTES
POST = {":method": "POST", ":path": "/generate"}
REFUSED = 13
"""Length of a body that is refused unseen."""
PLACED = ((contract.DECODE_HOST, b"10.0.0.1:1"),)

PHASES: dict[type, Phase] = {
    RequestHeaders: Phase.REQUEST_HEADERS,
    RequestBody: Phase.REQUEST_BODY,
    RequestTrailers: Phase.REQUEST_TRAILERS,
    ResponseHeaders: Phase.RESPONSE_HEADERS,
    ResponseBody: Phase.RESPONSE_BODY,
    ResponseTrailers: Phase.RESPONSE_TRAILERS,
}


@dataclass
class Echo:
    """Places every body as it is, but those that ask to be refused; remembers what it was asked."""

    placed: list[bytes] = field(default_factory=list)
    lengths: list[int | None] = field(default_factory=list)

    def place(self, api: Api, body: bytes, *_more: object, **_options: object) -> Decision | Rejection:
        self.placed.append(body)
        if body.startswith(b"refuse"):
            return Rejection(400, Reason.INVALID_JSON, "as asked")
        return Decision(body, PLACED, {contract.META_POOL: "p"}, InFlight(1, 0.0, (), ()))

    def lost(self, address: str) -> None:
        raise NotImplementedError

    def suspect(self, url: str) -> None:
        pass

    def contradicted(self, url: str, why: str) -> None:
        pass

    def engine_lost(self, fingerprint: str, address: str) -> None:
        raise NotImplementedError

    def place_unread(self, api: Api, length: int | None, *_more: object) -> Decision | Rejection:
        self.lengths.append(length)
        if length == REFUSED:
            return Rejection(400, Reason.CANNOT_CARRY_ROUTING, "as asked")
        return Decision(None, PLACED, {contract.META_POOL: "p"}, InFlight(1, 0.0, (), ()), streaming=None)

    def place_queued(self, *_request: object) -> Decision | Rejection:
        raise NotImplementedError

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        return Decision(None, PLACED, {contract.META_POOL: "p"}, None)

    def pass_on(self, passed: Passed, *_more: object) -> Decision | Rejection | None:
        return self.look_up()

    def models(self, path: str) -> Answer | Rejection:
        return Rejection(404, Reason.MODEL_NOT_FOUND, "no") if path.endswith("no") else Answer(b"{}")


def run(mode: BodyMode, events: Iterable[Event], *, response_mode: BodyMode = BodyMode.NONE) -> list[Reply]:
    exchange = Exchange(Echo(), mode, MAX_BODY, response_mode=response_mode)
    return [reply for event in events for reply in exchange.receive(event)]


def chunked(pieces: list[bytes]) -> list[Event]:
    last = len(pieces) - 1
    return [RequestHeaders(POST, False), *(RequestBody(piece, index == last) for index, piece in enumerate(pieces))]


LENGTHS = {
    "empty": (0, [0]),
    "one-byte": (1, [1]),
    "at-the-limit": (CHUNK_BYTES, [CHUNK_BYTES]),
    "one-beyond": (CHUNK_BYTES + 1, [CHUNK_BYTES, 1]),
    "twice-the-limit": (2 * CHUNK_BYTES, [CHUNK_BYTES, CHUNK_BYTES]),
    "twice-and-some": (2 * CHUNK_BYTES + 1000, [CHUNK_BYTES, CHUNK_BYTES, 1000]),
}


@pytest.mark.parametrize(("length", "sizes"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("trailers", [False, True], ids=["no-trailers", "trailers"])
def test_body_is_routed_in_full_chunks_but_for_the_last(length: int, sizes: list[int], trailers: bool) -> None:
    """Chunks are full but for the last, which alone ends the stream, and only if no trailers do."""
    body = b"x" * length
    ending: list[Event] = [RequestBody(body, not trailers), *([RequestTrailers()] if trailers else [])]
    head, *rest = run(BodyMode.DUPLEX, [RequestHeaders(POST, False), *ending])

    chunks = [reply for reply in rest if isinstance(reply, StreamedChunk)]
    assert isinstance(head, Mutate)
    assert [len(chunk.data) for chunk in chunks] == sizes
    assert [chunk.end_of_stream for chunk in chunks] == [False] * (len(sizes) - 1) + [not trailers]
    assert rest[len(chunks) :] == ([Continue(Phase.REQUEST_TRAILERS)] if trailers else [])


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
@example('{"text":"漢\\u6f22🦊"}'.encode(), list(range(30)))
@example(b"refuse this", [3, 3, 5])
@example(b"", [0, 0])
def test_replies_are_the_same_however_a_body_is_split(body: bytes, cuts: list[int]) -> None:
    """Where Envoy cuts a body, within a character or an escape, or sends nothing at all, changes nothing."""
    edges = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    pieces = [body[start:end] for start, end in pairwise(edges)]
    pieces = [piece for index, piece in enumerate(pieces) for piece in ([b""] * (index % 2) + [piece])] or [b""]

    assert run(BodyMode.DUPLEX, chunked(pieces)) == run(BodyMode.DUPLEX, chunked([body]))


def test_duplex_body_gets_no_reply_before_it_is_complete() -> None:
    """Headers are held with the body: the host is not known before."""
    assert run(BodyMode.DUPLEX, [RequestHeaders(POST, False), *[RequestBody(b"x", False)] * 5]) == []


def test_duplex_body_is_refused_as_soon_as_it_is_too_large() -> None:
    """The rest of it is not waited for, and not kept."""
    chunk = RequestBody(b"x" * CHUNK_BYTES, False)
    exchange = Exchange(Echo(), BodyMode.DUPLEX, MAX_BODY)
    exchange.receive(RequestHeaders(POST, False))
    for _ in range(4):
        assert exchange.receive(chunk) == ()
    (refusal,) = exchange.receive(RequestBody(b"x", False))
    assert isinstance(refusal, Immediate)
    assert (refusal.status, refusal.details) == (413, "body_too_large")
    assert exchange.receive(chunk) == ()


LENGTH_HEADERS = {
    "at-the-limit": (str(MAX_BODY), None),
    "one-beyond": (str(MAX_BODY + 1), 413),
    "of-5000-digits": ("9" * 5000, 413),
    "leading-zeros": ("0001", None),
    "negative": ("-1", None),
    "not-a-number": ("many", None),
    "empty": ("", None),
    "of-other-digits": ("\u00b2", None),
}


@pytest.mark.parametrize(("length", "status"), LENGTH_HEADERS.values(), ids=LENGTH_HEADERS)
@pytest.mark.parametrize("mode", [BodyMode.LOCKSTEP, BodyMode.DUPLEX], ids=lambda mode: mode.name)
def test_body_is_refused_unseen_when_its_announced_length_is_too_large(
    mode: BodyMode, length: str, status: int | None
) -> None:
    """A length above the limit refuses the body unseen; a text that is no number is ignored."""
    replies = run(mode, [RequestHeaders({**POST, "content-length": length}, False)])
    refused = [reply.status for reply in replies if isinstance(reply, Immediate)]
    assert refused == ([] if status is None else [status])


MEDIA = {
    "none": ({}, None),
    "json": ({"content-type": "application/json"}, None),
    "json-with-charset": ({"content-type": "application/json; charset=utf-8"}, None),
    "json-in-capitals": ({"content-type": "Application/JSON"}, None),
    "json-suffix": ({"content-type": "application/vnd.api+json"}, None),
    "form": ({"content-type": "application/x-www-form-urlencoded"}, 415),
    "multipart": ({"content-type": "multipart/form-data; boundary=x"}, 415),
    "text": ({"content-type": "text/plain"}, 415),
    "json-lines": ({"content-type": "application/jsonl"}, 415),
    "identity": ({"content-encoding": "identity"}, None),
    "gzip": ({"content-encoding": "gzip"}, 415),
    "zstd-in-capitals": ({"content-encoding": "ZSTD"}, 415),
    "gzip-twice": ({"content-encoding": "gzip, gzip"}, 415),
}


@pytest.mark.parametrize(("headers", "status"), MEDIA.values(), ids=MEDIA)
def test_body_is_awaited_only_if_its_headers_announce_plain_json(headers: dict[str, str], status: int | None) -> None:
    """What cannot be read is refused by its headers alone."""
    (reply,) = run(BodyMode.LOCKSTEP, [RequestHeaders({**POST, **headers}, False)])
    assert (reply.status if isinstance(reply, Immediate) else None) == status


@pytest.mark.parametrize("state", ["start", "held", "sent", "responding", "over"])
def test_internal_error_answers_the_client_until_the_response_begins(state: str) -> None:
    """Up to the response an error becomes a 500; later the client already has its answer."""
    exchange = Exchange(Echo(), BodyMode.DUPLEX, MAX_BODY)
    path: list[Event] = [RequestHeaders(POST, False), RequestBody(b"x", True), ResponseHeaders(200)]
    for event in path[: ["start", "held", "sent", "responding"].index(state) if state != "over" else 0]:
        exchange.receive(event)
    if state == "over":
        exchange.receive(RequestHeaders({}, False))
    replies = exchange.fail("broken")
    assert [reply.status for reply in replies if isinstance(reply, Immediate)] == (
        [] if state in {"responding", "over"} else [500]
    )
    assert exchange.fail("broken") == ()


_bodies = st.sampled_from([b"", b"{}", b"refuse", b"x" * (MAX_BODY // 2 + 1), b"\xff"])
_request_headers = st.fixed_dictionaries(
    {},
    optional={
        ":method": st.sampled_from(["POST", "POST", "GET", ""]),
        ":path": st.sampled_from(["/generate", "/generate", "/health", "/v1/models", "/v1/models/no", "/x", ""]),
        "content-type": st.sampled_from(["application/json", "text/plain", ""]),
        "content-encoding": st.sampled_from(["gzip", ""]),
        "content-length": st.text("0123456789٣² ", max_size=6),
        "x-dp-leg": st.text(max_size=3),
    },
)
_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(RequestHeaders, _request_headers, st.booleans()),
    st.builds(RequestBody, _bodies, st.booleans()),
    st.builds(RequestTrailers),
    st.builds(ResponseHeaders, st.integers(0, 599)),
    st.builds(ResponseBody, _bodies, st.booleans()),
    st.builds(ResponseTrailers),
)
_streams = st.one_of(
    st.lists(_events, max_size=8),
    st.lists(_events, max_size=7).map(lambda events: [RequestHeaders(POST, False), *events]),
)


@given(st.sampled_from(BodyMode), _streams, st.booleans(), st.integers(0, 8), st.booleans())
def test_replies_obey_the_protocol_in_any_sequence_of_events(
    mode: BodyMode, events: list[Event], response_duplex: bool, interrupted_at: int, fails: bool
) -> None:
    """One reply of its own phase to each event in lock-step, one immediate at most, nothing behind it."""
    decider = Echo()
    exchange = Exchange(decider, mode, MAX_BODY, response_mode=BodyMode.DUPLEX if response_duplex else BodyMode.NONE)
    over = False
    for index, event in enumerate(events):
        if index == interrupted_at:
            interruption = exchange.fail("x") if fails else exchange.expire()
            assert not (over and interruption)
            over = over or bool(interruption)
        try:
            replies = exchange.receive(event)
        except ProtocolViolationError:
            assert not over
            return
        if over:
            assert replies == ()
        elif any(isinstance(reply, Immediate) for reply in replies):
            assert len(replies) == 1
            over = True
        elif mode in {BodyMode.LOCKSTEP, BodyMode.NONE} and not response_duplex:
            assert [_phase(reply) for reply in replies if not isinstance(reply, Immediate)] == [PHASES[type(event)]]
            assert not any(isinstance(reply, StreamedChunk) for reply in replies)
        assert exchange.is_decided or not over
    assert len(decider.placed) + len(decider.lengths) <= 1
    assert not (decider.placed if mode is BodyMode.NONE else decider.lengths)


def _phase(reply: Reply) -> Phase | None:
    return None if isinstance(reply, Immediate | ExtendTimeout) else reply.phase


@given(_streams)
def test_headers_are_replied_to_first_and_once_in_duplex(events: list[Event]) -> None:
    """No chunk and no trailers are answered before the headers, and no body is replaced but by chunks."""
    exchange = Exchange(Echo(), BodyMode.DUPLEX, MAX_BODY)
    replies: list[Reply] = []
    try:
        for event in [RequestHeaders(POST, False), *events]:
            replies += exchange.receive(event)
    except ProtocolViolationError:
        pass
    phases = [_phase(reply) for reply in replies if not isinstance(reply, Immediate)]
    if Phase.REQUEST_HEADERS in phases:
        assert phases.index(Phase.REQUEST_HEADERS) == 0
        assert phases.count(Phase.REQUEST_HEADERS) == 1
    assert not [reply for reply in replies if isinstance(reply, Mutate) and reply.body is not None]


@pytest.mark.parametrize(
    ("length", "expected"), [("0", 0), ("17", 17), (None, None), ("x", None), ("-1", None)], ids=str
)
def test_headers_route_when_bodies_are_not_sent(length: str | None, expected: int | None) -> None:
    """The one reply to the headers routes, by the length that they announce; no body will come."""
    decider = Echo()
    exchange = Exchange(decider, BodyMode.NONE, MAX_BODY)
    announced = {} if length is None else {"content-length": length}
    (reply,) = exchange.receive(RequestHeaders({**POST, "x-override-priority": "1", **announced}, False))

    assert isinstance(reply, Mutate)
    assert (reply.phase, reply.set_headers, reply.body) == (Phase.REQUEST_HEADERS, PLACED, None)
    assert reply.remove_headers == ("x-override-priority",)
    assert reply.clear_route_cache
    assert decider.lengths == [expected]
    assert exchange.is_routed


def test_headers_are_refused_at_once_when_bodies_are_not_sent() -> None:
    """Before the body has left the client."""
    exchange = Exchange(Echo(), BodyMode.NONE, MAX_BODY)
    (reply,) = exchange.receive(RequestHeaders({**POST, "content-length": str(REFUSED)}, False))

    assert isinstance(reply, Immediate)
    assert reply.status == 400
