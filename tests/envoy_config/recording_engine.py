"""An HTTP server that records every request and responds with 200; ``/stream`` responds in two chunks."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dp_extproc.lab.testbed.ports import free_port


@dataclass(frozen=True, slots=True)
class Received:
    """One request as the engine received it."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class RecordingEngine:
    """The address of the engine and the requests that it received."""

    address: str
    received: list[Received] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of responses, which a test may set."""
    may_finish: threading.Event = field(default_factory=threading.Event)
    """Set by a test. Until then ``/stream`` delays its last chunk."""

    def one(self, request_id: str, deadline: float = 10.0) -> Received:
        """Wait for the request with that id and return it. A mirrored one may arrive after the client's response."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            found = self.of(request_id)
            if found:
                assert len(found) == 1
                return found[0]
            time.sleep(0.01)
        raise AssertionError(f"no request {request_id} at {self.address} after {deadline} s")

    def of(self, request_id: str) -> list[Received]:
        return [request for request in self.received if request.headers.get("x-request-id") == request_id]


@contextmanager
def run_engine(name: str) -> Iterator[RecordingEngine]:
    """Run a recording engine in a thread of its own."""
    port = free_port()
    engine = RecordingEngine(f"127.0.0.1:{port}")

    async def record(request: Request) -> Response:
        body = await request.body()
        engine.received.append(Received(request.url.path, dict(request.headers), body))
        if request.url.path == "/stream":
            return StreamingResponse(stream())
        if request.url.path.startswith("/status/"):
            wait = request.headers.get("test-retry-after")
            return Response(status_code=int(request.url.path[8:]), headers={"retry-after": wait} if wait else {})
        return JSONResponse({"answered_by": name, "bytes": len(body)}, headers=engine.headers)

    async def stream() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.to_thread(engine.may_finish.wait, 10)
        yield b"last"

    app = Starlette(routes=[Route("/{path:path}", record, methods=["GET", "POST", "OPTIONS"])])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, name=name)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield engine
    finally:
        server.should_exit = True
        thread.join()
