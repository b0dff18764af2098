"""An ext_proc server that follows the ``test-*`` headers of a request.

It uses the protocol of the printed configuration in both body modes, without models or load. Tests with it check the
configuration alone, not the service.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from envoy.type.v3 import http_status_pb2
from google.protobuf import struct_pb2

from dp_extproc import contract

Answers = Iterator[pb.ProcessingResponse]

DECODE_PREFIX = b'{"leg":"decode","room":7,'
PREFILL_PREFIX = b'{"leg":"the other one","room":7,'
CHUNK = 62_000
LEG_TOKEN = "leg-1"


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """Initial metadata and status that the stream of a prefill leg reported."""

    metadata: Mapping[str, str]
    status: str


@dataclass(slots=True)
class ScriptedService(pb_grpc.ExternalProcessorServicer):  # type: ignore[misc]  # generated without types
    """A service that sends every request to the same two endpoints, unless its headers name others."""

    prefill: str
    decode: str
    owner: str = ""
    seen_headers: list[Mapping[str, str]] = field(default_factory=list)
    prefill_reports: list[PrefillReport] = field(default_factory=list)

    def Process(  # noqa: N802 - the name is gRPC's
        self, request_iterator: Iterator[pb.ProcessingRequest], context: grpc.ServicerContext
    ) -> Answers:
        """Serve one stream: that of a request or that of a prefill leg."""
        first = next(request_iterator)
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        if contract.LEG in metadata:
            answer = first
            if first.HasField("request_headers"):  # Otherwise Envoy has responded before.
                yield pb.ProcessingResponse(request_headers=pb.HeadersResponse())
                answer = next(request_iterator)
            status = _headers(answer.response_headers.headers)[":status"]
            self.prefill_reports.append(PrefillReport(metadata, status))
            yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
            return
        if not first.HasField("request_headers"):
            yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
            return
        duplex = first.protocol_config.request_body_mode == 4  # FULL_DUPLEX_STREAMED
        yield from self._place(first, request_iterator, duplex)
        for message in request_iterator:
            match message.WhichOneof("request"):
                case "response_headers":
                    yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
                case "response_trailers":
                    yield pb.ProcessingResponse(response_trailers=pb.TrailersResponse())
                case other:
                    raise AssertionError(f"unexpected {other}")

    def _place(self, first: pb.ProcessingRequest, messages: Iterator[pb.ProcessingRequest], duplex: bool) -> Answers:
        headers = _headers(first.request_headers.headers)
        self.seen_headers.append(headers)
        if "test-refuse" in headers:
            yield _refusal(with_reason=headers["test-refuse"] == "with-reason")
            return
        decode = headers.get("test-decode-host", self.decode)
        if first.request_headers.end_of_stream:
            common = _common({contract.DECODE_HOST: decode}, clear_route_cache=True)
            yield pb.ProcessingResponse(
                request_headers=pb.HeadersResponse(response=common), dynamic_metadata=_metadata(decode, None)
            )
            return
        if not duplex:
            yield pb.ProcessingResponse(request_headers=pb.HeadersResponse())
        body = b""
        for message in messages:
            if message.HasField("response_headers"):  # Envoy refused the body by itself.
                yield pb.ProcessingResponse(response_headers=pb.HeadersResponse())
                return
            body += message.request_body.body
            if message.request_body.end_of_stream:
                break
        routing = {contract.DECODE_HOST: decode}
        placed = body
        if "test-one-server" not in headers:
            placed = DECODE_PREFIX + body[1:]
            routing |= {
                contract.PREFILL_HOST: headers.get("test-prefill-host", self.prefill),
                contract.PREFILL_PREFIX: PREFILL_PREFIX.decode() + "x" * int(headers.get("test-longer-prefix", "0")),
                contract.PREFIX_LENGTH: headers.get("test-prefix-length", str(len(DECODE_PREFIX))),
                contract.OWNER: self.owner,
                contract.LEG: LEG_TOKEN,
            }
        metadata = _metadata(decode, routing.get(contract.PREFILL_HOST))
        if duplex:
            common = _common(routing, clear_route_cache=True)
            yield pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common), dynamic_metadata=metadata)
            for start in range(0, len(placed), CHUNK):
                yield _chunk(placed[start : start + CHUNK], last=start + CHUNK >= len(placed))
        else:
            common = _common({**routing, "content-length": str(len(placed))}, clear_route_cache=True)
            common.body_mutation.body = placed
            yield pb.ProcessingResponse(request_body=pb.BodyResponse(response=common), dynamic_metadata=metadata)


@contextmanager
def run_service(prefill: str, decode: str, port: int) -> Iterator[ScriptedService]:
    """Run a scripted service on *port* of the loopback interface."""
    service = ScriptedService(prefill, decode, owner=f"127.0.0.1:{port}")
    options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(max_workers=16), options=options)
    pb_grpc.add_ExternalProcessorServicer_to_server(service, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield service
    finally:
        server.stop(grace=None).wait()


def _headers(headers: base_pb2.HeaderMap) -> dict[str, str]:
    return {header.key: header.raw_value.decode() for header in headers.headers}


def _mutation(headers: Mapping[str, str]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            base_pb2.HeaderValueOption(
                header=base_pb2.HeaderValue(key=key, raw_value=value.encode()),
                append_action=base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for key, value in headers.items()
        ]
    )


def _common(headers: Mapping[str, str], *, clear_route_cache: bool) -> pb.CommonResponse:
    return pb.CommonResponse(header_mutation=_mutation(headers), clear_route_cache=clear_route_cache)


def _chunk(body: bytes, *, last: bool) -> pb.ProcessingResponse:
    streamed = pb.StreamedBodyResponse(body=body, end_of_stream=last)
    common = pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=streamed))
    return pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))


def _metadata(decode: str, prefill: str | None) -> struct_pb2.Struct:
    placement: dict[str, str | int] = {contract.META_MODEL: "small", contract.META_POOL: "small,tiny"}
    placement |= {contract.META_DECODE_HOST: decode, contract.META_DECODE_RANK: 3}
    if prefill is not None:
        placement |= {contract.META_PREFILL_HOST: prefill, contract.META_PREFILL_RANK: 2}
    metadata = struct_pb2.Struct()
    metadata.update({contract.METADATA_NAMESPACE: placement})
    return metadata


def _refusal(*, with_reason: bool) -> pb.ProcessingResponse:
    headers = {"content-type": "application/json", "retry-after": "7", "x-reason": "no_capacity"}
    answer = pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=http_status_pb2.HttpStatus(code=429),
            headers=_mutation(headers),
            body=json.dumps({"error": {"message": "full", "code": "of the service"}}).encode(),
            details="no_capacity",
        )
    )
    if with_reason:
        answer.dynamic_metadata.update({contract.METADATA_NAMESPACE: {contract.META_REASON: "no_capacity"}})
    return answer
