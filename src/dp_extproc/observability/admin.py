"""The admin port with /metrics, /healthz, /readyz and /loads."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route


class Pages(Protocol):
    """Contents of the pages: of this process, or of all worker processes."""

    async def metrics(self) -> bytes:
        """Return /metrics in the text format of Prometheus."""

    async def ready(self) -> bool:
        """Return whether requests can be scheduled."""

    async def loads(self) -> dict[str, Any]:
        """Return /loads as JSON data."""


def admin_app(pages: Pages) -> Starlette:
    """Make the ASGI application that serves the pages."""

    async def show_metrics(_request: Request) -> Response:
        return Response(await pages.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if await pages.ready() else PlainTextResponse("not ready\n", 503)

    async def show_loads(_request: Request) -> Response:
        return JSONResponse(await pages.loads())

    return Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/loads", show_loads),
        ]
    )


class AdminServer(uvicorn.Server):
    """A uvicorn server on a socket that is open already. It leaves signals to the process."""

    def __init__(self, pages: Pages, listening: socket.socket) -> None:
        super().__init__(uvicorn.Config(admin_app(pages), log_config=None, access_log=False, lifespan="off"))
        self._listening = listening

    async def run_on_socket(self) -> None:
        """Serve until ``should_exit`` is set."""
        await self.serve(sockets=[self._listening])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none, unlike uvicorn."""
        yield
