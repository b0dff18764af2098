"""Events that an attempt receives and commands that it returns, free of protobuf.

The shapes of main-stream events and of replies follow ``external_processor.proto``. Where many events are used, this
module is imported as ``on``, so that a table reads ``on.RequestBody``.
"""

from enum import Enum, IntEnum, StrEnum, auto

from msgspec import Struct

from dp_extproc.load.records import NO_WORK, Work
from dp_extproc.response.first_event import EngineError
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Headers, LegAbort, Metadata, PrefillRequest


class BodyMode(Enum):
    """How Envoy sends the bodies of requests or of responses: ``processing_mode.proto``, BodySendMode."""

    LOCKSTEP = "one message with the whole body; Envoy waits for one reply to each message"
    DUPLEX = "chunks; replies come at any time, in the order headers, body, trailers"
    NONE = "no body"
    UNSUPPORTED = "chunks that must be answered one by one: too late to pick by the whole body"


# --- events of the main stream ---


class RequestHeaders(Struct, frozen=True):
    """The request begins."""

    headers: dict[str, str]
    """Headers of :mod:`dp_extproc.contract`: those that the service reads, and those that no client may set.

    Names are in lower case; a repeated header has its last value.
    """
    end_of_stream: bool
    """No body follows."""


class RequestBody(Struct, frozen=True):
    """The body has arrived, or in duplex a chunk of it."""

    data: bytes
    end_of_stream: bool


class RequestTrailers(Struct, frozen=True):
    """The request ends with trailers."""


class ResponseHeaders(Struct, frozen=True):
    """The response begins."""

    status: int
    end_of_stream: bool = False
    """No body follows."""
    is_events: bool = False
    """Whether the body is a stream of server-sent events (``text/event-stream``)."""
    served: str | None = None
    """``IP:port`` of the endpoint that served the request, where the gateway reports it."""
    is_encoded: bool = False
    """Whether the body has a content encoding, such as gzip, so that it cannot be read here."""
    is_loss: bool = False
    """Whether it is the gateway's own, and means that the engine dropped a request that it had accepted."""


class ResponseBody(Struct, frozen=True):
    """A piece of the response has arrived, because it was asked for or the operator's filter chain sends it."""

    data: bytes
    end_of_stream: bool


class ResponseTrailers(Struct, frozen=True):
    """The response ends with trailers."""


class MainClosed(Struct, frozen=True):
    """The main stream has ended: the response is complete, or the client has left."""

    keeps_leg: bool = False
    """Whether the prefill leg is to go on, because the stream ended only for the stop of the process."""


# --- events of the admission queue ---


class RoomFreed(Struct, frozen=True):
    """A rank may have room for the queued request, and no other request is before it."""

    ticket: Ticket


class QueueExpired(Struct, frozen=True):
    """The queued request has waited too long, or the queue is full."""


# --- events of /abort_request ---


class AbortWanted(Struct, frozen=True):
    """The client has sent an ``/abort_request`` with an id of this request."""

    prompts: tuple[int, ...]
    """The prompts that the id stands for."""


# --- events of the prefill leg ---


class LegOpened(Struct, frozen=True):
    """The prefill leg is about to go to its engine."""


class LegHeaders(Struct, frozen=True):
    """The response of the prefill leg begins; it comes from the engine or from Envoy in its place."""

    status: int
    end_of_stream: bool = False
    is_events: bool = False


class LegBody(Struct, frozen=True):
    """A piece of the prefill leg's response has arrived."""

    data: bytes
    end_of_stream: bool


class LegClosed(Struct, frozen=True):
    """The stream of the prefill leg has ended, or its connection where the service sends it itself."""

    problem: str = ""
    """Why it ended without a response, if that is known."""
    is_lost: bool = False
    """Whether the engine has dropped the connection after it had accepted the request."""


class LegUnseen(Struct, frozen=True):
    """The engine computes the prefill leg, but its response is lost with the connection."""


# --- other events ---


class FirstEventRead(Struct, frozen=True):
    """The first event of a streamed response was read on its way to the client."""

    error: EngineError | None


class CommentRead(Struct, frozen=True):
    """A streamed response has begun with comments, which keep the connection of a client alive that waits."""


class InternalError(Struct, frozen=True):
    """The handling of an event has raised an exception, which is in the log."""

    message: str


MainEvent = RequestHeaders | RequestBody | RequestTrailers | ResponseHeaders | ResponseBody | ResponseTrailers
"""Messages of Envoy on the main stream."""
LegEvent = LegOpened | LegHeaders | LegBody | LegClosed | LegUnseen
FirstEvent = FirstEventRead | CommentRead
Event = MainEvent | MainClosed | RoomFreed | QueueExpired | AbortWanted | LegEvent | FirstEvent | InternalError


# --- replies to Envoy on the main stream ---


class Phase(StrEnum):
    """The kind of message that a reply answers; the protocol requires the same kind back."""

    REQUEST_HEADERS = "request_headers"
    REQUEST_BODY = "request_body"
    REQUEST_TRAILERS = "request_trailers"
    RESPONSE_HEADERS = "response_headers"
    RESPONSE_BODY = "response_body"
    RESPONSE_TRAILERS = "response_trailers"


class Continue(Struct, frozen=True):
    """Let the message pass unchanged."""

    phase: Phase


class Mutate(Struct, frozen=True):
    """Let the message pass with changes. Envoy applies header changes in a body reply only in lock-step."""

    phase: Phase
    set_headers: tuple[tuple[str, bytes], ...] = ()
    remove_headers: tuple[str, ...] = ()
    body: bytes | None = None
    clear_route_cache: bool = False
    metadata: Metadata | None = None
    destination: str | None = None
    """``IP:port`` for the load balancing of the gateway, in the endpoint-picker protocol."""


class BufferBody(Struct, frozen=True):
    """Let the response headers pass, and ask for the whole body in one message."""

    phase: Phase = Phase.RESPONSE_HEADERS


class StreamBody(Struct, frozen=True):
    """Let the response headers pass, and ask for the body as it arrives. Its content and length may be changed."""

    phase: Phase = Phase.RESPONSE_HEADERS


class SkipBody(Struct, frozen=True):
    """Let the response headers pass, and ask for no body. Gateways that allow no other modes ignore the wish."""

    phase: Phase = Phase.RESPONSE_HEADERS


class ExtendTimeout(Struct, frozen=True):
    """Let Envoy wait longer than usual for the reply to its last message."""

    seconds: float


class StreamedChunk(Struct, frozen=True):
    """Pass on a chunk of a body in duplex."""

    phase: Phase
    data: bytes
    end_of_stream: bool


class Immediate(Struct, frozen=True):
    """Answer the client at once; no reply may follow on the stream."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]
    details: str
    """Value of %RESPONSE_CODE_DETAILS% in access logs."""
    metadata: Metadata | None = None


Reply = Continue | Mutate | BufferBody | StreamBody | SkipBody | ExtendTimeout | StreamedChunk | Immediate


# --- commands ---


class ToLeg(IntEnum):
    """What is to happen to the prefill leg."""

    PROCEED = auto()
    STREAM_BODY = auto()
    """Proceed, and report the body as it arrives."""
    BUFFER_BODY = auto()
    """Proceed, and report the whole body in one event."""
    CANCEL = auto()


class Enqueue(Struct, frozen=True):
    """Put the request into the admission queue."""

    pool: str
    priority: int
    """Requests of greater priority leave the queue first."""
    work: Work = NO_WORK


class SendLeg(Struct, frozen=True):
    """Send the prefill leg from here."""

    request: PrefillRequest
    path: str
    """Path and query of the client's request."""
    headers: Headers
    """Headers of the client's request that the leg has, too."""


class AbortRequests(Struct, frozen=True):
    """End the requests that a client has sent under an id, in whichever process they are."""

    key: str
    """See :func:`.client_key`."""


Command = Reply | AbortRequests | ToLeg | Enqueue | SendLeg | LegAbort
"""A reply goes to the main stream. Commands for a stream that is gone are dropped."""
