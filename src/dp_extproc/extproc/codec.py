"""Protobuf messages as events, and replies as protobuf messages. No other module reads or writes the messages."""

from typing import Final

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    CommonResponse,
    HeaderMutation,
    HttpHeaders,
    ProcessingRequest,
    ProcessingResponse,
)

from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Continue,
    ExtendTimeout,
    Immediate,
    LegBody,
    LegHeaders,
    LegOpened,
    MainEvent,
    Mutate,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamBody,
    StreamedChunk,
)
from dp_extproc.contract import (
    DESTINATION,
    DESTINATION_SERVED,
    DESTINATION_SUBSET,
    LB_NAMESPACE,
    METADATA_NAMESPACE,
    READ_FROM_REQUESTS,
    SESSION,
    SUBSET_NAMESPACE,
    UNTRUSTED_NAMES,
    UNTRUSTED_PREFIXES,
)
from dp_extproc.scheduling.decision import Metadata
from dp_extproc.scheduling.filters import read_subset

_UNTRUSTED: Final = frozenset({*UNTRUSTED_NAMES, DESTINATION})
_EVENTS: Final = b"text/event-stream"
_LEG_OPENED: Final = LegOpened()

_BODY_MODES: Final = {
    ProcessingMode.NONE: BodyMode.NONE,
    ProcessingMode.BUFFERED: BodyMode.LOCKSTEP,
    ProcessingMode.FULL_DUPLEX_STREAMED: BodyMode.DUPLEX,
}


def read_modes(first: ProcessingRequest) -> tuple[BodyMode, BodyMode]:
    """Read the body modes from the first message of a stream, the only one that has them.

    Returns:
        The mode of the request body and that of the response body. An Envoy before 1.33 does not report them, and is
        taken to send both bodies buffered.
    """
    if not first.HasField("protocol_config"):
        return BodyMode.LOCKSTEP, BodyMode.LOCKSTEP
    config = first.protocol_config
    modes = config.request_body_mode, config.response_body_mode
    request, response = (_BODY_MODES.get(mode, BodyMode.UNSUPPORTED) for mode in modes)
    return request, response


def read_subset_hint(message: ProcessingRequest) -> frozenset[str] | None:
    """Read the endpoints that may be picked: a list or a text of addresses between commas. None means all."""
    hint = message.metadata_context.filter_metadata.get(SUBSET_NAMESPACE)
    if hint is None or DESTINATION_SUBSET not in hint.fields:
        return None
    value = hint.fields[DESTINATION_SUBSET]
    if value.WhichOneof("kind") == "list_value":
        return read_subset(each.string_value for each in value.list_value.values)
    return read_subset((value.string_value,))


def read_event(message: ProcessingRequest, session_header: str | None = SESSION) -> MainEvent | None:
    """Read a message of a main stream; None for one without a meaning here.

    Args:
        message: The message.
        session_header: The header that names the conversation, besides the headers that are read in any case.
    """
    match message.WhichOneof("request"):
        case "request_headers":
            headers = message.request_headers
            return RequestHeaders(_headers(headers, session_header), headers.end_of_stream)
        case "request_body":
            body = message.request_body
            return RequestBody(body.body, body.end_of_stream)
        case "response_headers":
            headers = message.response_headers
            status, media = _read_response(headers)
            return ResponseHeaders(status, headers.end_of_stream, media.startswith(_EVENTS), _served(message))
        case "response_body":
            chunk = message.response_body
            return ResponseBody(chunk.body, chunk.end_of_stream)
        case "request_trailers":
            return RequestTrailers()
        case "response_trailers":
            return ResponseTrailers()
        case _:
            return None


def read_leg_event(message: ProcessingRequest) -> LegOpened | LegHeaders | LegBody | None:
    """Read a message of the stream of a prefill leg; None for one that has no meaning there."""
    match message.WhichOneof("request"):
        case "request_headers":
            return _LEG_OPENED
        case "response_headers":
            headers = message.response_headers
            status, media = _read_response(headers)
            return LegHeaders(status, headers.end_of_stream, media.startswith(_EVENTS))
        case "response_body":
            chunk = message.response_body
            return LegBody(chunk.body, chunk.end_of_stream)
        case _:
            return None


def write_reply(reply: Reply) -> bytes:
    """Write a reply as a serialised ProcessingResponse."""
    if isinstance(reply, Continue):
        return _CONTINUE[reply.phase]
    if isinstance(reply, Mutate):
        return _write_mutation(reply)
    if isinstance(reply, BufferBody):
        return _BUFFER_BODY
    if isinstance(reply, StreamBody):
        return _STREAM_BODY
    response = ProcessingResponse()
    if isinstance(reply, StreamedChunk):
        answer = response.request_body if reply.phase is Phase.REQUEST_BODY else response.response_body
        chunk = answer.response.body_mutation.streamed_response
        chunk.body = reply.data
        chunk.end_of_stream = reply.end_of_stream
        # An empty chunk in mid-stream has only default values, but it must be present.
        chunk.SetInParent()
    elif isinstance(reply, ExtendTimeout):
        response.override_message_timeout.FromNanoseconds(int(reply.seconds * 1e9))
    else:
        _write_immediate(reply, response)
    return bytes(response.SerializeToString())


def _write_mutation(reply: Mutate) -> bytes:
    response = ProcessingResponse()
    common: CommonResponse = getattr(response, reply.phase.value).response
    common.SetInParent()
    if reply.body is not None:
        common.body_mutation.body = reply.body
    if reply.clear_route_cache:
        common.clear_route_cache = True
    mutation: HeaderMutation = common.header_mutation
    for name, value in reply.set_headers:
        header = mutation.set_headers.add().header
        header.key = name
        header.raw_value = value
    if reply.remove_headers:
        mutation.remove_headers.extend(reply.remove_headers)
    if reply.metadata is not None:
        _write_metadata(reply.metadata, response)
    if reply.destination is not None:
        fields = response.dynamic_metadata.fields[LB_NAMESPACE].struct_value.fields
        fields[DESTINATION].string_value = reply.destination
    return bytes(response.SerializeToString())


def _write_metadata(metadata: Metadata, response: ProcessingResponse) -> None:
    # Struct.update() does the same in five times the time.
    fields = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value.fields
    for name, value in metadata.items():
        if isinstance(value, str):
            fields[name].string_value = value
        else:
            fields[name].number_value = value


def _write_immediate(reply: Immediate, response: ProcessingResponse) -> None:
    immediate = response.immediate_response
    immediate.status.code = reply.status
    immediate.body = reply.body
    immediate.details = reply.details
    for name, value in reply.headers:
        option: HeaderValueOption = immediate.headers.set_headers.add()
        option.header.key = name
        option.header.raw_value = value.encode()
    if reply.metadata is not None:
        _write_metadata(reply.metadata, response)


def _headers(message: HttpHeaders, session_header: str | None) -> dict[str, str]:
    """Read the headers that the service reads, and those that no client may set."""
    found: dict[str, str] = {}
    for header in message.headers.headers:
        name = header.key
        if (
            name in READ_FROM_REQUESTS
            or name in _UNTRUSTED
            or name == session_header
            or name.startswith(UNTRUSTED_PREFIXES)
        ):
            # Envoy fills raw_value; older ones filled value.
            found[name] = header.raw_value.decode("latin-1") or header.value
    return found


def _read_response(message: HttpHeaders) -> tuple[int, bytes]:
    """Read the status, 0 if there is none, and the content type."""
    status, media = 0, b""
    for header in message.headers.headers:
        if header.key == ":status":
            text = header.raw_value or header.value.encode()
            status = int(text) if text.isdigit() else 0
        elif header.key == "content-type":
            media = header.raw_value or header.value.encode()
    return status, media


def _served(message: ProcessingRequest) -> str | None:
    served = message.metadata_context.filter_metadata.get(LB_NAMESPACE)
    if served is None or DESTINATION_SERVED not in served.fields:
        return None
    return served.fields[DESTINATION_SERVED].string_value or None


def _continue(phase: Phase) -> bytes:
    response = ProcessingResponse()
    getattr(response, phase.value).SetInParent()
    return bytes(response.SerializeToString())


def _ask_for_body(mode: ProcessingMode.BodySendMode, *remove: str) -> bytes:
    response = ProcessingResponse()
    response.response_headers.response.SetInParent()
    if remove:
        response.response_headers.response.header_mutation.remove_headers.extend(remove)
    # The whole mode is overridden, so the parts that stay the same are repeated.
    response.mode_override.response_body_mode = mode
    response.mode_override.response_header_mode = ProcessingMode.SEND
    response.mode_override.response_trailer_mode = ProcessingMode.SEND
    return bytes(response.SerializeToString())


_CONTINUE: Final = {phase: _continue(phase) for phase in Phase}
_BUFFER_BODY: Final = _ask_for_body(ProcessingMode.BUFFERED)
_STREAM_BODY: Final = _ask_for_body(ProcessingMode.STREAMED, "content-length")
