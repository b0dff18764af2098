"""A real gRPC server around the service, and a client that speaks the protocol through another implementation of it.

Requests are encoded and answers decoded by ``envoy_data_plane`` (betterproto2), so that what the service does with
``xds-protos`` is read by another implementation.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grpc
import grpc.aio
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)

from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.attempt.gateways import BundledEnvoy, EndpointPicker
from dp_extproc.attempt.intake import Decider
from dp_extproc.attempt.listener import Decided, LegFailed
from dp_extproc.config.reliability import RetrySettings, Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.direct_leg import DirectLegs
from dp_extproc.extproc.service import SERVICE_NAME, ExtProcService
from dp_extproc.request.rejection import Reason

METHOD = f"/{SERVICE_NAME}/Process"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
POST = {":method": "POST", ":path": "/v1/completions", "content-type": "application/json"}
GET = {":method": "GET", ":path": "/health"}


def request_headers(
    headers: Mapping[str, str] = POST,
    *,
    end: bool = False,
    mode: Mode | None = None,
    response_mode: Mode = Mode.NONE,
    **more: Any,
) -> ProcessingRequest:
    config = None if mode is None else ProtocolConfiguration(request_body_mode=mode, response_body_mode=response_mode)
    return ProcessingRequest(request_headers=_headers(headers, end=end), protocol_config=config, **more)


def request_body(data: bytes, *, end: bool = True) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=data, end_of_stream=end))


def request_trailers() -> ProcessingRequest:
    return ProcessingRequest(request_trailers=HttpTrailers())


def response_headers(status: int = 200, *, end: bool = False, **more: Any) -> ProcessingRequest:
    return ProcessingRequest(response_headers=_headers({":status": str(status)}, end=end), **more)


def response_body(data: bytes, *, end: bool) -> ProcessingRequest:
    return ProcessingRequest(response_body=HttpBody(body=data, end_of_stream=end))


def response_trailers() -> ProcessingRequest:
    return ProcessingRequest(response_trailers=HttpTrailers())


def _headers(headers: Mapping[str, str], *, end: bool) -> HttpHeaders:
    values = [HeaderValue(key=name, raw_value=value.encode("latin-1")) for name, value in headers.items()]
    return HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=end)


Answer = Any
"""A ProcessingResponse. Every field of it may be None for the type checker; a test that trips over one has failed."""


def kind_of(message: Answer) -> str:
    """Name what a response answers."""
    (kind,) = [kind for kind in KINDS if getattr(message, kind) is not None]
    return kind


KINDS = {
    "request_headers",
    "request_body",
    "request_trailers",
    "response_headers",
    "response_body",
    "response_trailers",
    "immediate_response",
}


def headers_of(message: Answer) -> dict[str, bytes]:
    """Read the headers that a response sets. Exactly one of value and raw_value may be there; ours are raw."""
    answer = getattr(message, kind_of(message))
    common = answer if kind_of(message) == "immediate_response" else answer.response
    mutation = common and (common.headers if common is answer else common.header_mutation)
    found = {}
    for option in mutation.set_headers if mutation else ():
        assert not option.header.value
        assert not option.append_action
        assert option.append is None
        found[option.header.key] = option.header.raw_value
    return found


UNSUPERVISED = SupervisionSettings(mode=Supervise.OFF)


class Stream:
    """One ext_proc stream, seen by Envoy."""

    def __init__(self, channel: grpc.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        call = channel.stream_stream(METHOD, None, None)
        self.call = call(iter(self._outgoing.get, None), metadata=tuple(metadata), timeout=20)

    def send(self, *messages: ProcessingRequest) -> None:
        for message in messages:
            self._outgoing.put(bytes(message))

    def receive(self) -> Answer:
        return ProcessingResponse.parse(next(self.call))

    def ask(self, message: ProcessingRequest) -> Answer:
        """Send one message and wait for one answer, as lock-step wants."""
        self.send(message)
        return self.receive()

    def close(self) -> list[Answer]:
        """Half-close, and take in whatever still comes."""
        self._outgoing.put(None)
        return [ProcessingResponse.parse(message) for message in self.call]

    def cancel(self) -> None:
        """End as Envoy does when the client has left."""
        self.call.cancel()
        self._outgoing.put(None)


@dataclass
class Watcher:
    """Counts what attempts report."""

    opened: int = 0
    closed: int = 0
    decisions: list[str] = field(default_factory=list)
    failures: list[tuple[Role, Reason, bool]] = field(default_factory=list)
    unseen: int = 0
    skipped: int = 0
    holds: list[bool] = field(default_factory=list)
    """Whether each hold was in vain."""
    elsewhere: int = 0

    def attempt_opened(self) -> None:
        self.opened += 1

    def destination_mismatch(self) -> None:
        self.elsewhere += 1

    def attempt_closed(self) -> None:
        self.closed += 1

    def decided(self, decided: Decided) -> None:
        assert decided.seconds >= 0
        self.decisions.append(decided.outcome)

    def leg_failed(self, failed: LegFailed) -> None:
        self.failures.append((failed.leg, failed.reason, failed.retried))

    def held(self, seconds: float, *, in_vain: bool) -> None:
        assert seconds > 0
        self.holds.append(in_vain)

    def responses_skipped(self) -> None:
        self.skipped += 1

    def leg_missing(self) -> None:
        self.unseen += 1


@dataclass(frozen=True)
class Server:
    """The service behind a real port."""

    channel: grpc.Channel
    watcher: Watcher
    leave: Callable[[], None]
    """Do what the service does before its process ends."""
    tasks: Callable[[], int]
    """Count the tasks of the event loop."""

    def stream(self, **metadata: str) -> Stream:
        return Stream(self.channel, [(name.replace("_", "-"), value) for name, value in metadata.items()])


@contextmanager
def run_server(
    decider: Decider,
    *,
    supervision: SupervisionSettings = UNSUPERVISED,
    retry: RetrySettings | None = None,
    max_body: int = 40 << 20,
    hold_seconds: float = 60.0,
    picks: bool = False,
    legs: Callable[[], DirectLegs] | None = None,
) -> Iterator[Server]:
    """Serve *decider* on a free loopback port, in a thread with an event loop of its own."""
    watcher = Watcher()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int, ExtProcService, asyncio.Task[None]]:
        service = ExtProcService(
            decider,
            (watcher,),
            gateway=EndpointPicker() if picks else BundledEnvoy(),
            supervision=supervision,
            budget=None if retry is None else RetryBudget(retry),
            max_body=max_body,
            clock=loop.time,
            body_pause=hold_seconds,
            legs=None if legs is None else legs(),
        )
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((service.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port, service, asyncio.create_task(service.sweep())

    async def stop(server: grpc.aio.Server, sweeper: asyncio.Task[None]) -> None:
        await server.stop(None)
        await service.close()
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)

    server, port, service, sweeper = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield Server(
                channel,
                watcher,
                lambda: asyncio.run_coroutine_threadsafe(service.leave(), loop).result(10),
                lambda: len(asyncio.all_tasks(loop)),
            )
    finally:
        asyncio.run_coroutine_threadsafe(stop(server, sweeper), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
