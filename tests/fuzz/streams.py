"""Random scripts of everything that can happen on the streams of a few requests, and a stage to play them on."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from hypothesis import strategies as st

from dp_extproc import contract
from dp_extproc.config.reliability import QueueSettings, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.scheduling.admission import AdmissionQueue
from dp_extproc.scheduling.encoder import LegSettings
from extproc.wire import Watcher
from fleet_fixtures import Fleet, make_facts

MAX_BODY: Final = 2000
REQUESTS: Final = 3
"""That are under way at the same time, at most."""

_PATHS = st.sampled_from(
    [
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/x",
        "/health",
        "/v1/embeddings",
        "",
    ]
)
_HEADERS = st.dictionaries(
    st.sampled_from([
        "content-type", "content-length", "content-encoding", contract.AVOID, contract.SESSION, contract.LEG,
        contract.OWNER, contract.DECODE_HOST, "x-override-rid", "x-data-parallel-rank", ":status", "",
    ]),
    st.sampled_from([
        "application/json", "gzip", "0", "12", "9" * 30, "-1", "10.0.0.1:31001,10.0.0.1:32001", ";,;",
        ",10.0.0.1:32001,cut", "é\r\n",
    ])
    | st.text(max_size=8),
    max_size=4,
)  # fmt: skip
_BODIES = st.sampled_from([
    b'{"model":"m","prompt":"hello"}', b'{"prompt":"hello","stream":true}', b'{"text":"a","stream":true}',
    b'{"text":["a","b"],"stream":true}', b'{"messages":[{"role":"user","content":"a"}],"stream":true}',
    b'{"prompt":"a","n":2}', b'{"prompt":', b"", b"\xff", b"[]", b"x" * (MAX_BODY // 2),
]) | st.binary(max_size=20)  # fmt: skip
_ANSWERS = st.sampled_from([
    b'data: {"text":"a"}\n\n', b'data: {"error":{"code":500}}\n\ndata: [DONE]\n\n', b'data: {"error":{"code":400}}\n\n',
    b'data: {"meta_info":{"finish_reason":{"type":"abort","status_code":503}}}\n\n', b"event: error\n", b": ping\n\n",
    b'{"error":{"message":"Lost connection with prefill instance"}}', b"\n", b"",
]) | st.binary(max_size=20)  # fmt: skip
_STATUSES = st.sampled_from(["200", "200", "400", "429", "500", "502", "503", "", "abc", "99999"])
_MODES = st.sampled_from([
    None, ProcessingMode.BUFFERED, ProcessingMode.FULL_DUPLEX_STREAMED, ProcessingMode.NONE, ProcessingMode.STREAMED,
    ProcessingMode.BUFFERED_PARTIAL, 77,
])  # fmt: skip


@st.composite
def _request_headers(draw: st.DrawFn) -> ProcessingRequest:
    message = ProcessingRequest()
    headers = {":method": draw(st.sampled_from(["POST", "POST", "POST", "GET", ""])), ":path": draw(_PATHS)}
    headers |= draw(st.just({"content-type": "application/json"}) | _HEADERS)
    _set_headers(message.request_headers, headers, draw(st.integers(0, 5)) == 0)
    mode = draw(_MODES)
    if mode is not None:
        message.protocol_config.request_body_mode = mode
        message.protocol_config.response_body_mode = draw(_MODES.filter(lambda each: each is not None))
    message.observability_mode = draw(st.integers(0, 20)) == 0
    return message


@st.composite
def _request_body(draw: st.DrawFn) -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_body.body = draw(_BODIES)
    message.request_body.end_of_stream = draw(st.integers(0, 2)) > 0
    return message


@st.composite
def _response_headers(draw: st.DrawFn) -> ProcessingRequest:
    message = ProcessingRequest()
    _set_headers(message.response_headers, {":status": draw(_STATUSES)}, draw(st.integers(0, 3)) == 0)
    return message


@st.composite
def _response_body(draw: st.DrawFn) -> ProcessingRequest:
    message = ProcessingRequest()
    message.response_body.body = draw(_ANSWERS)
    message.response_body.end_of_stream = draw(st.booleans())
    return message


def _with(kind: str) -> ProcessingRequest:
    message = ProcessingRequest()
    getattr(message, kind).SetInParent()
    return message


MESSAGES = st.one_of(
    _request_headers(),
    _request_body(),
    _response_headers(),
    _response_body(),
    st.sampled_from(["request_trailers", "response_trailers"]).map(_with),
    st.just(ProcessingRequest()),
)


@st.composite
def _whole_request(draw: st.DrawFn) -> list[ProcessingRequest]:
    """The messages of a request as Envoy would send them, so that scripts get far enough."""
    head = draw(_request_headers())
    head.request_headers.end_of_stream = False
    head.protocol_config.request_body_mode = draw(
        st.sampled_from([ProcessingMode.BUFFERED, ProcessingMode.FULL_DUPLEX_STREAMED])
    )
    _set_headers(head.request_headers, {":method": "POST", ":path": "/v1/completions"}, False)
    body = _with("request_body")
    body.request_body.body = draw(st.sampled_from([b'{"prompt":"a"}', b'{"prompt":"a","stream":true}']))
    body.request_body.end_of_stream = True
    return [head, body]


@dataclass(frozen=True)
class Say:
    """Envoy sends messages on one of the streams of a request."""

    request: int
    stream: str
    messages: list[ProcessingRequest]


@dataclass(frozen=True)
class End:
    """Envoy ends a stream, by closing its half or by cancelling it."""

    request: int
    stream: str
    cancels: bool


@dataclass(frozen=True)
class Wait:
    """Time passes."""

    seconds: float


_STREAMS = st.sampled_from(["main", "main", "leg", "leg", "first event", "unknown leg"])
_NUMBERS = st.integers(0, REQUESTS - 1)
SCRIPTS = st.lists(
    st.one_of(
        st.builds(Say, _NUMBERS, st.just("main"), _whole_request()),
        st.builds(Say, _NUMBERS, _STREAMS, st.lists(MESSAGES, min_size=1, max_size=3)),
        st.builds(Say, _NUMBERS, st.just("leg"), st.tuples(_request_headers(), _response_headers()).map(list)),
        st.builds(End, _NUMBERS, _STREAMS, st.booleans()),
        st.builds(Wait, st.sampled_from([0.0, 0.1, 1.0, 6.0, 61.0, 300.0])),
    ),
    min_size=1,
    max_size=14,
)


def _set_headers(message: Any, headers: Mapping[str, str], end: bool) -> None:
    del message.headers.headers[:]
    for name, value in headers.items():
        header = message.headers.headers.add()
        header.key, header.raw_value = name, value.encode("utf-8")
    message.end_of_stream = end


class FakeContext:
    """One stream, as grpc.aio gives it to a handler."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.written: list[bytes] = []
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        self.ended = False
        self._writing = False
        self._metadata = tuple(metadata.items())

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    async def read(self) -> Any:
        if self.ended and self.incoming.empty():
            return grpc.aio.EOF
        message = await self.incoming.get()
        return message if message is grpc.aio.EOF else message.SerializeToString()

    async def write(self, message: bytes) -> None:
        assert not self._writing, "gRPC allows no two writes at once"
        self._writing = True
        await asyncio.sleep(0)
        self._writing = False
        self.written.append(message)

    async def abort(self, code: Any, details: str = "") -> None:
        raise grpc.aio.AbortError

    def answers(self) -> list[ProcessingResponse]:
        return [ProcessingResponse.FromString(each) for each in self.written]


@dataclass
class _Open:
    context: FakeContext
    task: asyncio.Task[None]
    said: int = 0


@dataclass
class Stage:
    """A service, and what has been opened on it."""

    fleet: Fleet
    service: ExtProcService
    queue: AdmissionQueue
    streams: list[_Open] = field(default_factory=list)
    _current: dict[tuple[int, str], _Open] = field(default_factory=dict)

    @classmethod
    def build(cls, supervision: SupervisionSettings) -> "Stage":
        """Build it in the running loop, with two servers of each role and little room on each."""
        clock = asyncio.get_running_loop().time
        fleet = Fleet(prefills=[make_facts(Role.PREFILL)] * 2, decodes=[make_facts(Role.DECODE)] * 2)
        queue = AdmissionQueue(QueueSettings.model_validate({"max_wait": "1s", "max_depth": 2}))
        scheduler = fleet.make_scheduler(clock=clock, queue=queue, legs=LegSettings(reports_first_events=True))
        service = ExtProcService(
            scheduler, (Watcher(),), supervision=supervision, queue=queue, max_body=MAX_BODY, clock=clock
        )
        return cls(fleet, service, queue)

    async def play(self, step: Say | End | Wait) -> None:
        """Play one step of a script, and let all tasks react."""
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Say):
            stream = self._stream(step.request, step.stream)
            for message in step.messages:
                stream.said += 1
                stream.context.incoming.put_nowait(message)
                await _settle()
        elif (stream_ := self._current.pop((step.request, step.stream), None)) is not None:
            await self._end(stream_, cancels=step.cancels)
        await _settle()

    async def finish(self) -> None:
        """Close whatever is open, and let all waits run out."""
        for stream in self._current.values():
            await self._end(stream, cancels=False)
        await asyncio.sleep(400)

    async def _end(self, stream: _Open, *, cancels: bool) -> None:
        stream.context.ended = True
        stream.context.incoming.put_nowait(grpc.aio.EOF)
        if cancels:
            stream.task.cancel()
        await _settle()

    def _stream(self, request: int, kind: str) -> _Open:
        found = self._current.get((request, kind))
        if found is None or found.task.done():
            metadata = {
                "main": {},
                "leg": {contract.LEG: self._token(request)},
                "unknown leg": {contract.LEG: "no such leg"},
            }
            context = FakeContext(
                metadata.get(kind, {contract.LEG: self._token(request), contract.STAGE: contract.FIRST_EVENT})
            )
            found = _Open(context, asyncio.ensure_future(self.service.process(None, context)))
            self._current[request, kind] = found
            self.streams.append(found)
        return found

    def _token(self, request: int) -> str:
        """Find the token of a request's leg in what was said on its main stream."""
        main = self._current.get((request, "main"))
        for answer in main.context.answers() if main is not None else ():
            for phase in ("request_headers", "request_body"):
                for option in getattr(answer, phase).response.header_mutation.set_headers:
                    if option.header.key == contract.LEG:
                        return str(option.header.raw_value.decode())
        return "not placed yet"


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
