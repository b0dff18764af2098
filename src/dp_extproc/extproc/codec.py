"""Protobuf messages as events, and replies as protobuf messages. No other module reads or writes the messages."""

from typing import Final

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpHeaders, ProcessingRequest, ProcessingResponse

from dp_extproc import contract
from dp_extproc.attempt import events as on
from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Continue,
    ExtendTimeout,
    Immediate,
    Mutate,
    Phase,
    Reply,
    SkipBody,
    StreamBody,
    StreamedChunk,
)
from dp_extproc.scheduling.decision import Metadata
from dp_extproc.scheduling.filters import read_subset

_NAMES: Final = contract.READ_FROM_REQUESTS.union(
    contract.PASSED_TO_PREFILL, contract.UNTRUSTED_NAMES, (contract.DESTINATION,)
)
"""Request headers that the service reads, and those that no client may set, as far as they have full names."""
_EVENT_STREAM: Final = b"text/event-stream"
_NOT_ENCODED: Final = frozenset({b"", b"identity"})
_LEG_OPENED: Final = on.LegOpened()

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
    hint = message.metadata_context.filter_metadata.get(contract.SUBSET_NAMESPACE)
    if hint is None or contract.DESTINATION_SUBSET not in hint.fields:
        return None
    value = hint.fields[contract.DESTINATION_SUBSET]
    if value.WhichOneof("kind") == "list_value":
        return read_subset(each.string_value for each in value.list_value.values)
    return read_subset((value.string_value,))


def read_event(message: ProcessingRequest, session_header: str | None = contract.SESSION) -> on.MainEvent | None:
    """Read a message of a main stream; None for one without a meaning here.

    Args:
        message: The message.
        session_header: The header that names the conversation, besides the headers that are read in any case.
    """
    match message.WhichOneof("request"):
        case "request_headers":
            headers = message.request_headers
            return on.RequestHeaders(_read_request(headers, session_header), headers.end_of_stream)
        case "request_body":
            body = message.request_body
            return on.RequestBody(body.body, body.end_of_stream)
        case "response_headers":
            headers = message.response_headers
            status, is_events, is_encoded, is_loss = _read_response(headers)
            served = _read_served(message)
            return on.ResponseHeaders(status, headers.end_of_stream, is_events, served, is_encoded, is_loss)
        case "response_body":
            chunk = message.response_body
            return on.ResponseBody(chunk.body, chunk.end_of_stream)
        case "request_trailers":
            return on.RequestTrailers()
        case "response_trailers":
            return on.ResponseTrailers()
        case _:
            return None


def read_leg_event(message: ProcessingRequest) -> on.LegOpened | on.LegHeaders | on.LegBody | None:
    """Read a message of the stream of a prefill leg; None for one that has no meaning there."""
    match message.WhichOneof("request"):
        case "request_headers":
            return _LEG_OPENED
        case "response_headers":
            headers = message.response_headers
            status, is_events, _, _ = _read_response(headers)
            return on.LegHeaders(status, headers.end_of_stream, is_events)
        case "response_body":
            chunk = message.response_body
            return on.LegBody(chunk.body, chunk.end_of_stream)
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
    if isinstance(reply, SkipBody):
        return _SKIP_BODY
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
    common = getattr(response, reply.phase.value).response
    common.SetInParent()
    if reply.body is not None:
        common.body_mutation.body = reply.body
    if reply.clear_route_cache:
        common.clear_route_cache = True
    mutation = common.header_mutation
    for name, value in reply.set_headers:
        header = mutation.set_headers.add().header
        header.key = name
        header.raw_value = value
    if reply.remove_headers:
        mutation.remove_headers.extend(reply.remove_headers)
    if reply.metadata is not None:
        _write_metadata(reply.metadata, response)
    if reply.destination is not None:
        fields = response.dynamic_metadata.fields[contract.LB_NAMESPACE].struct_value.fields
        fields[contract.DESTINATION].string_value = reply.destination
    return bytes(response.SerializeToString())


def _write_metadata(metadata: Metadata, response: ProcessingResponse) -> None:
    # Struct.update() does the same in five times the time.
    fields = response.dynamic_metadata.fields[contract.METADATA_NAMESPACE].struct_value.fields
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
        header = immediate.headers.set_headers.add().header
        header.key = name
        header.raw_value = value.encode()
    if reply.metadata is not None:
        _write_metadata(reply.metadata, response)


def _read_request(message: HttpHeaders, session_header: str | None) -> dict[str, str]:
    """Read the headers that the service reads, and those that no client may set."""
    found: dict[str, str] = {}
    for header in message.headers.headers:
        name = header.key
        if name in _NAMES or name == session_header or name.startswith(contract.UNTRUSTED_PREFIXES):
            # Envoy fills raw_value; older ones filled value.
            found[name] = header.raw_value.decode("latin-1") or header.value
    return found


def _read_response(message: HttpHeaders) -> tuple[int, bool, bool, bool]:
    """Read the head of a response.

    Returns:
        The status, 0 if there is none; whether the body is a stream of server-sent events; whether it is encoded; and
        whether the response is Envoy's own and reports a loss.
    """
    status, is_events, is_encoded, is_loss = 0, False, False, False
    for header in message.headers.headers:
        if header.key == ":status":
            text = header.raw_value or header.value.encode()
            status = int(text) if text.isdigit() else 0
        elif header.key == "content-type":
            is_events = (header.raw_value or header.value.encode()).lower().startswith(_EVENT_STREAM)
        elif header.key == "content-encoding":
            is_encoded = (header.raw_value or header.value.encode()).strip().lower() not in _NOT_ENCODED
        elif header.key == contract.FAILED:
            is_loss = contract.is_loss((header.raw_value or header.value.encode()).decode("latin-1"))
    return status, is_events, is_encoded, is_loss


def _read_served(message: ProcessingRequest) -> str | None:
    """Read the endpoint that served the request, if the gateway reports it."""
    served = message.metadata_context.filter_metadata.get(contract.LB_NAMESPACE)
    if served is None or contract.DESTINATION_SERVED not in served.fields:
        return None
    return served.fields[contract.DESTINATION_SERVED].string_value or None


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
_SKIP_BODY: Final = _ask_for_body(ProcessingMode.NONE)
