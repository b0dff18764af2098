"""The admin port: /metrics, /healthz, /readyz, /loads."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route


def admin_app(
    *, metrics: Callable[[], bytes], ready: Callable[[], bool], loads: Callable[[], dict[str, Any]]
) -> Starlette:
    """Make the ASGI application out of what it shows."""

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", status_code=503)

    async def show_loads(_request: Request) -> Response:
        return JSONResponse(loads())

    return Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/loads", show_loads),
        ]
    )


class AdminServer(uvicorn.Server):
    """A uvicorn server that leaves signals and sockets to the service it is part of."""

    def __init__(self, app: Starlette, listening: socket.socket) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        self._listening = listening

    async def run_on_socket(self) -> None:
        """Serve until ``should_exit``."""
        await self.serve(sockets=[self._listening])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
