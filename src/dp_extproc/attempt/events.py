"""What Envoy tells and what it is told, free of protobuf. Shapes follow ``external_processor.proto``.

Here and wherever else something is made for every request, frozen data are msgspec structs: to make one takes a quarter
of the time of a frozen dataclass.
"""

from enum import Enum, StrEnum

from msgspec import Struct

from dp_extproc.scheduling.decision import Metadata


class BodyMode(Enum):
    """How bodies come, of requests or of responses: ``processing_mode.proto``, BodySendMode."""

    LOCKSTEP = "one message with the whole body, one answer to each message"
    DUPLEX = "chunks; answers whenever, in the order headers, body, trailers"
    NONE = "no body"
    UNSUPPORTED = "chunks that must be answered one by one: too late to choose a host by the whole body"


class RequestHeaders(Struct, frozen=True):
    """The request begins."""

    headers: dict[str, str]
    """Those of :mod:`dp_extproc.contract`: that are read, and that no client may set. Lower-case names; of a
    repeated header the last value."""
    end_of_stream: bool
    """There will be no body."""


class RequestBody(Struct, frozen=True):
    """The body, or in duplex a chunk of it."""

    data: bytes
    end_of_stream: bool


class RequestTrailers(Struct, frozen=True):
    """The request ends with trailers."""


class ResponseHeaders(Struct, frozen=True):
    """The response begins."""

    status: int
    end_of_stream: bool = False
    """There will be no body."""
    is_events: bool = False
    """Whether it is a stream of events (``text/event-stream``)."""
    served: str | None = None
    """``IP:port`` that has answered, where the gateway tells it."""


class ResponseBody(Struct, frozen=True):
    """A piece of the response. Only where it was asked for, or the operator's filter chain sends it."""

    data: bytes
    end_of_stream: bool


class ResponseTrailers(Struct, frozen=True):
    """The response ends with trailers."""


Event = RequestHeaders | RequestBody | RequestTrailers | ResponseHeaders | ResponseBody | ResponseTrailers


class Phase(StrEnum):
    """Which kind of message an answer belongs to; the protocol wants the same kind back."""

    REQUEST_HEADERS = "request_headers"
    REQUEST_BODY = "request_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"


class Continue(Struct, frozen=True):
    """Go on, nothing changed."""

    phase: Phase


class Mutate(Struct, frozen=True):
    """Go on with changes. Header changes in a body answer count only in lock-step."""

    phase: Phase
    set_headers: tuple[tuple[str, bytes], ...] = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    clear_route_cache: bool = False
    metadata: Metadata | None = None
    destination: str | None = None
    """``IP:port`` for the gateway's load balancing, in the endpoint-picker protocol."""


class BufferBody(Struct, frozen=True):
    """Go on, and send the response's body as a whole: of errors, and of answers that are no streams."""

    phase: Phase


class StreamBody(Struct, frozen=True):
    """Go on, and send the response's body as it comes; it may be changed on its way, also in its length."""

    phase: Phase


class ExtendTimeout(Struct, frozen=True):
    """Wait longer than usual for the answer to the message before."""

    seconds: float


class StreamedChunk(Struct, frozen=True):
    """A chunk of a body in duplex."""

    phase: Phase
    data: bytes
    end_of_stream: bool


class Immediate(Struct, frozen=True):
    """Answer the client at once; nothing may follow on the stream."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]
    details: str
    """Shows as %RESPONSE_CODE_DETAILS% in access logs."""
    metadata: Metadata | None = None


Reply = Continue | Mutate | BufferBody | StreamBody | ExtendTimeout | StreamedChunk | Immediate
