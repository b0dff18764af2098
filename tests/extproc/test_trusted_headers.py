"""Every header that the service reads from requests, and whose word it takes for it."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Final

import grpc
import pytest
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode

from attempt.attempts import Exchange
from dp_extproc import contract
from dp_extproc.attempt.events import BodyMode, Mutate, Phase, RequestBody, RequestHeaders
from dp_extproc.engines.model import Role
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection
from dp_extproc.scheduling.decision import Answer, Decision, Queued, RequestContext
from extproc.wire import (
    POST,
    Server,
    headers_of,
    kind_of,
    request_body,
    request_headers,
    response_body,
    response_headers,
    run_server,
)
from fleet_fixtures import Fleet, make_facts

WORKER = "10.0.0.1:33001"
CUT = f"-,{WORKER},cut"
BODY = b'{"prompt":"hello"}'
DUPLEX, BUFFERED, NONE = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED, Mode.NONE
CONVERSATION: Final = "x-conversation"

OF_THE_REQUEST: Final = {":method", ":path", "content-type", "content-encoding", "content-length"}
"""What it is: read from anybody, for the engine reads the same."""
PASSED: Final = {"traceparent", "tracestate", "x-request-id", "authorization"}
"""They go along with a prefill leg that the service sends, as they go along with the decode leg."""
OF_OUR_ENVOY: Final = {contract.SESSION: "chat-1", contract.AVOID: CUT}
"""Headers that the bundled Envoy sets, and removes from clients. Behind another gateway they are untrusted."""
NEVER_READ: Final = {
    **dict.fromkeys(contract.SET_INSIDE, WORKER),
    **OF_OUR_ENVOY,
    "x-dp-anything": "1",
    "x-override-rid": "victim",
    "x-override-routed-dp-rank": "1",
    "x-override-anything": "1",
    "x-data-parallel-rank": "1",
    contract.DESTINATION: WORKER,
}
"""Headers that a client may send to another gateway. No engine may get them, and the service does not read them."""


def test_tables_name_every_header_that_is_read() -> None:
    """A new header has to be put into one of the tables."""
    assert OF_THE_REQUEST | OF_OUR_ENVOY.keys() == contract.READ_FROM_REQUESTS
    assert contract.READ_BEHIND_GATEWAY == OF_THE_REQUEST | PASSED
    assert set(contract.PASSED_TO_PREFILL) == PASSED
    ours = {
        each for each in vars(contract).values() if isinstance(each, str) and each.startswith(contract.OWNED_PREFIX)
    }
    assert set(contract.SET_INSIDE) == ours - {contract.OWNED_PREFIX, contract.SESSION, contract.REASON_HEADER}


@dataclass
class Listener:
    """Places everything, and keeps the context of each request."""

    heard: list[RequestContext] = field(default_factory=list)

    def place(self, api: Api, body: bytes, context: RequestContext) -> Decision | Rejection:
        self.heard.append(context)
        return Decision(body, ((contract.DECODE_HOST, WORKER.encode()),), {}, InFlight(1, 0.0, (), ()))

    def place_unread(self, api: Api, length: int | None, context: RequestContext) -> Decision | Rejection:
        raise NotImplementedError

    def place_queued(self, queued: Queued, context: RequestContext) -> Decision | Rejection:
        raise NotImplementedError

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        raise NotImplementedError

    def pass_on(self, *_request: object) -> Decision | Rejection:
        raise NotImplementedError

    def models(self, path: str) -> Answer | Rejection:
        raise NotImplementedError

    def lost(self, address: str) -> None:
        """Our own front door reports it; this is of no interest here."""

    def suspect(self, url: str) -> None:
        pass

    def contradicted(self, url: str, why: str) -> None:
        pass

    def engine_lost(self, fingerprint: str, address: str) -> None:
        """Only engines drop requests, and there are none."""


def read_headers(
    headers: Mapping[str, str], *, picks: bool, session_header: str | None = contract.SESSION
) -> dict[str, object]:
    """Tell what an exchange makes of the headers of a request."""
    listener = Listener()
    exchange = Exchange(listener, BodyMode.LOCKSTEP, 1000, picks=picks, session_header=session_header)
    exchange.receive(RequestHeaders({**POST, **headers}, False))
    exchange.receive(RequestBody(BODY, True))
    (heard,) = listener.heard
    return {"session": heard.session, "failed": heard.failed, "cut": exchange.cut}


NOTHING: Final = {"session": None, "failed": (), "cut": None}


@pytest.mark.parametrize("name", NEVER_READ)
def test_header_of_a_client_is_not_read_behind_a_gateway(name: str) -> None:
    """None of it means anything behind a front door that is not ours."""
    assert read_headers({name: NEVER_READ[name]}, picks=True, session_header=None) == NOTHING


def test_headers_of_the_bundled_envoy_are_read() -> None:
    """It removes from clients what it sets."""
    expected = {"session": "chat-1", "failed": (frozenset({"-", WORKER}),), "cut": WORKER}

    assert read_headers(OF_OUR_ENVOY, picks=False) == expected


def test_session_is_read_from_the_configured_header_behind_a_gateway() -> None:
    """A gateway of others sends all headers, so the service reads the one that is configured, and leaves it there."""
    headers = {CONVERSATION: "chat-1", contract.SESSION: "chat-2"}
    exchange = Exchange(Listener(), BodyMode.LOCKSTEP, 1000, picks=True, session_header=CONVERSATION)

    assert read_headers(headers, picks=True, session_header=CONVERSATION)["session"] == "chat-1"
    assert exchange.receive(RequestHeaders({**POST, **headers}, False)) == (
        Mutate(Phase.REQUEST_HEADERS, remove_headers=(contract.SESSION,)),
    )


@dataclass(frozen=True)
class Running:
    """The service, and whom it may place requests on."""

    server: Server
    fleet: Fleet


@pytest.fixture
def picker() -> Iterator[Running]:
    fleet = Fleet(workers=[make_facts(Role.WORKER)])
    with run_server(fleet.scheduler, picks=True) as server:
        yield Running(server, fleet)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *product(["/v1/completions", "/v1/embeddings", "/health"], [DUPLEX, BUFFERED]),
        *product(["/v1/embeddings", "/health"], [NONE]),  # what is read needs a body
    ],
)
def test_untrusted_headers_are_removed_behind_a_gateway(picker: Running, path: str, mode: Mode) -> None:
    """Whatever is read of the request; over gRPC, as a gateway of others sends it."""
    stream = picker.server.stream()
    stream.send(request_headers({**POST, **NEVER_READ, ":path": path}, mode=mode), request_body(BODY))
    head = stream.receive()
    stream.close()

    sets = headers_of(head)
    assert set(head.request_headers.response.header_mutation.remove_headers) == NEVER_READ.keys() - sets.keys()
    assert sets.get(contract.DESTINATION, WORKER.encode()) == WORKER.encode()


def test_endpoint_is_not_blamed_for_a_header_of_a_client(picker: Running) -> None:
    """The report of a lost server is our own front door's."""
    for _ in range(5):
        stream = picker.server.stream()
        stream.send(request_headers({**POST, contract.AVOID: CUT}, mode=BUFFERED), request_body(BODY))
        stream.close()

    assert picker.fleet.endpoint(Role.WORKER).health.failures == 0
    assert picker.server.watcher.failures == []
    assert picker.server.watcher.decisions == ["routed"] * 5


STEALING: Final = [
    pytest.param({contract.LEG: "KEY", contract.STAGE: contract.FIRST_EVENT}, id="as a first event"),
    pytest.param({contract.LEG: "KEY"}, id="as a prefill leg"),
]
FAILURE: Final = b'data: {"error":{"code":500,"message":"stolen"}}\n\n'


@pytest.mark.parametrize("metadata", STEALING)
@pytest.mark.parametrize("picks", [False, True], ids=["own", "picks"])
def test_attempt_without_a_leg_is_found_by_no_other_stream(picks: bool, metadata: dict[str, str]) -> None:
    """Numbers that can be counted are no keys: another stream cannot end the request, nor answer in its place."""
    fleet = Fleet(workers=[make_facts(Role.WORKER)])
    with run_server(fleet.scheduler, picks=picks) as server:
        victim = server.stream()
        victim.send(request_headers(mode=BUFFERED), request_body(BODY))
        assert [kind_of(victim.receive()) for _ in range(2)] == ["request_headers", "request_body"]
        for key in ("0", "1", "2", "", "-"):
            thief = server.stream(**{name: value.replace("KEY", key) for name, value in metadata.items()})
            thief.send(
                response_body(FAILURE, end=True) if contract.STAGE in metadata else response_headers(500, end=True)
            )
            with suppress(grpc.RpcError):  # what begins with a body is no request
                thief.close()

        assert kind_of(victim.ask(response_headers())) == "response_headers"
        assert victim.close() == []
        assert server.watcher.failures == []


@pytest.mark.parametrize("metadata", STEALING)
def test_every_stream_is_a_request_behind_a_gateway(picker: Running, metadata: dict[str, str]) -> None:
    """One that makes metadata of a client's headers does not take the request from the service."""
    stream = picker.server.stream(**metadata)
    stream.send(request_headers(mode=DUPLEX), request_body(BODY))
    head = stream.receive()
    stream.close()

    assert headers_of(head)[contract.DESTINATION] == WORKER.encode()
