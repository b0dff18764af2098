"""A gateway that calls an endpoint picker as agentgateway does, which is no Envoy: a client of ext_proc and of engines.

It follows the source of agentgateway (August 2026, ``http/ext_proc.rs``):

1. Both bodies go in full duplex, with trailers. Pieces of a body are sent at once, before any reply has come.
2. A body ends with an empty piece of its own if its end was not known with the last one.
3. Metadata goes along with the messages of the response alone, with each of them: the endpoint that has served.
4. Replies are sorted into those of the request and those of the response, and only one of each kind waits. An immediate
   response counts for both.
5. The destination is the request header, one ``IP:port``; a list is an error. It must be a known endpoint.
6. A stream that ends before the reply to the headers is an error (500), as the gateway fails closed.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import grpc.aio
import httpx
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from dp_extproc.extproc.service import SERVICE_NAME

_METHOD = f"/{SERVICE_NAME}/Process"
_DESTINATION = "x-gateway-destination-endpoint"
_FRAME = 16_384
"""Bytes of a frame of HTTP/2, and so of a piece of a body."""
_SECONDS = 30.0
"""Longest time of a request in a test."""
_OF_REQUEST = {"request_headers", "request_body", "request_trailers"}


@dataclass(frozen=True, slots=True)
class Response:
    """What the client gets."""

    status: int
    body: bytes
    headers: dict[str, str]
    served: str = ""
    """The endpoint that has answered; empty if none was asked."""


class NoMoreResponsesError(Exception):
    """The stream has ended too early; a client would get status 500."""


@dataclass
class AgentGateway:
    """The gateway; *endpoints* are the ``IP:port`` that it has of the pool."""

    picker: str
    endpoints: Collection[str]
    sent_messages: int = 0
    _replies: dict[bool, "asyncio.Queue[Any]"] = field(default_factory=dict)

    async def post(self, path: str, body: bytes) -> Response:
        """Send one request, and read its whole response."""
        self._replies = {True: asyncio.Queue(1), False: asyncio.Queue(1)}
        async with grpc.aio.insecure_channel(self.picker) as channel, httpx.AsyncClient(timeout=30) as client:
            call = channel.stream_stream(
                _METHOD,
                request_serializer=ProcessingRequest.SerializeToString,
                response_deserializer=ProcessingResponse.FromString,
            )()
            reading = asyncio.create_task(self._sort(call))
            try:
                async with asyncio.timeout(_SECONDS):
                    return await self._exchange(call, client, path, body)
            finally:
                call.cancel()
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _sort(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError):
            async for reply in call:
                kind = reply.WhichOneof("response")
                sides = (True, False) if kind == "immediate_response" else (kind in _OF_REQUEST,)
                for side in sides:
                    await self._replies[side].put(reply)
        for queue in self._replies.values():
            await queue.put(None)

    async def _reply(self, *, of_request: bool) -> Any:
        reply = await self._replies[of_request].get()
        if reply is None:
            raise NoMoreResponsesError
        return reply

    async def _exchange(self, call: Any, client: httpx.AsyncClient, path: str, body: bytes) -> Response:
        headers = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "llm.example.com"}
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        await self._write(call, _headers("request_headers", headers, is_first=True))
        writing = asyncio.create_task(self._write_body(call, "request_body", _pieces(body), None))
        try:
            reply = await self._reply(of_request=True)
            if reply.HasField("immediate_response"):
                return _immediate(reply)
            headers = _mutated(headers, reply.request_headers.response.header_mutation)
            destination = headers[_DESTINATION]
            host, _, port = destination.rpartition(":")
            ip_address(host.strip("[]"))
            assert port.isdecimal(), destination
            assert destination in self.endpoints
            del headers["content-length"]
            content = {name: value for name, value in headers.items() if not name.startswith(":")}
            request = client.build_request(
                "POST", f"http://{destination}{path}", content=self._request_body(), headers=content
            )
            return await self._respond(call, client, request, destination)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _request_body(self) -> AsyncIterator[bytes]:
        while True:
            reply = await self._reply(of_request=True)
            piece = reply.request_body.response.body_mutation.streamed_response
            if piece.body:
                yield piece.body
            if piece.end_of_stream or reply.HasField("request_trailers"):
                return

    async def _respond(
        self, call: Any, client: httpx.AsyncClient, request: httpx.Request, destination: str
    ) -> Response:
        first = asyncio.create_task(self._reply(of_request=False))
        sending = asyncio.create_task(client.send(request, stream=True))
        await asyncio.wait((first, sending), return_when=asyncio.FIRST_COMPLETED)
        if first.done() and not sending.done():  # an immediate response in place of the engine's
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            return _immediate(await first)
        answer = await sending
        writing: asyncio.Task[None] | None = None
        try:
            headers = {":status": str(answer.status_code), "content-type": answer.headers.get("content-type", "")}
            await self._write(call, _headers("response_headers", headers, served=destination))
            writing = asyncio.create_task(self._write_body(call, "response_body", answer.aiter_raw(), destination))
            reply = await first
            if reply.HasField("immediate_response"):
                return _immediate(reply)
            headers = _mutated(headers, reply.response_headers.response.header_mutation)
            received = bytearray()
            while True:
                reply = await self._reply(of_request=False)
                piece = reply.response_body.response.body_mutation.streamed_response
                received += piece.body
                if piece.end_of_stream or reply.HasField("response_trailers"):
                    return Response(answer.status_code, bytes(received), headers, destination)
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            await answer.aclose()

    async def _write(self, call: Any, message: ProcessingRequest) -> None:
        self.sent_messages += 1
        await call.write(message)

    async def _write_body(self, call: Any, kind: str, pieces: AsyncIterator[bytes], served: str | None) -> None:
        async for piece in pieces:
            message = _with_served(ProcessingRequest(), served)
            getattr(message, kind).body = piece
            await self._write(call, message)
        last = _with_served(ProcessingRequest(), served)
        getattr(last, kind).end_of_stream = True
        await self._write(call, last)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _FRAME):
        yield body[start : start + _FRAME]


def _headers(
    kind: str, headers: dict[str, str], *, is_first: bool = False, served: str | None = None
) -> ProcessingRequest:
    message = _with_served(ProcessingRequest(), served)
    if is_first:
        message.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
        message.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    for name, value in headers.items():
        header = getattr(message, kind).headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    return message


def _with_served(message: ProcessingRequest, served: str | None) -> ProcessingRequest:
    if served is not None:
        fields = message.metadata_context.filter_metadata["envoy.lb"].fields
        fields[f"{_DESTINATION}-served"].string_value = served
    return message


def _mutated(headers: dict[str, str], mutation: Any) -> dict[str, str]:
    changed = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
    return {name: value for name, value in {**headers, **changed}.items() if name not in mutation.remove_headers}


def _immediate(reply: Any) -> Response:
    answer = reply.immediate_response
    body = answer.body if isinstance(answer.body, bytes) else answer.body.encode()
    return Response(answer.status.code, body, _mutated({}, answer.headers))
