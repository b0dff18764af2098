"""What Envoy tells and what it is told, free of protobuf. Shapes follow ``external_processor.proto``."""

from dataclasses import dataclass
from enum import Enum, StrEnum

from dp_extproc.placement.decision import Metadata


class BodyMode(Enum):
    """How request bodies come: ``processing_mode.proto``, BodySendMode."""

    LOCKSTEP = "one message with the whole body, one answer to each message"
    DUPLEX = "chunks; answers whenever, in the order headers, body, trailers"
    NONE = "no body"
    UNSUPPORTED = "chunks that must be answered one by one: too late to choose a host by the whole body"


@dataclass(slots=True)
class RequestHeaders:
    """The request begins."""

    headers: dict[str, str]
    """Lower-case names; of a repeated header the last value."""
    end_of_stream: bool
    """There will be no body."""


@dataclass(slots=True)
class RequestBody:
    """The body, or in duplex a chunk of it."""

    data: bytes
    end_of_stream: bool


@dataclass(slots=True)
class RequestTrailers:
    """The request ends with trailers."""


@dataclass(slots=True)
class ResponseHeaders:
    """The response begins."""

    status: int


@dataclass(slots=True)
class ResponseBody:
    """A piece of the response. Only where the operator's filter chain sends it."""

    data: bytes
    end_of_stream: bool


@dataclass(slots=True)
class ResponseTrailers:
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


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on, nothing changed."""

    phase: Phase


@dataclass(slots=True)
class Mutate:
    """Go on with changes. Header changes in a body answer count only in lock-step."""

    phase: Phase
    set_headers: tuple[tuple[str, bytes], ...] = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    clear_route_cache: bool = False
    metadata: Metadata | None = None


@dataclass(slots=True)
class StreamedChunk:
    """A chunk of a body in duplex."""

    phase: Phase
    data: bytes
    end_of_stream: bool


@dataclass(frozen=True, slots=True)
class Immediate:
    """Answer the client at once; nothing may follow on the stream."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]
    details: str
    """Shows as %RESPONSE_CODE_DETAILS% in access logs."""
    metadata: Metadata | None = None


Reply = Continue | Mutate | StreamedChunk | Immediate
