"""Serve a port that can be closed and opened again while the process runs."""

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dp_extproc.lab.engine.connection import Connection
from dp_extproc.lab.engine.settings import Tls


class Listener:
    """Connect one port to its application."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: Tls | None = None) -> None:
        """Prepare, without listening."""
        self._tls = tls
        self._app = app
        self._host = host
        self._port = port
        self._server: _QuietServer | None = None
        self._serving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Listen, unless it does already.

        Raises:
            OSError: The port is taken, or a file of TLS cannot be used.
        """
        if self._server is not None:
            return
        sock = _listen(self._host, self._port)
        config = uvicorn.Config(
            self._app, http=Connection, log_level="error", access_log=False, lifespan="off", **_tls_options(self._tls)
        )
        self._server = _QuietServer(config)
        self._serving = asyncio.create_task(self._server.serve([sock]))
        await self._server.ready.wait()

    async def close(self) -> None:
        """Stop listening, and close all open connections."""
        server, self._server = self._server, None
        if server is None or self._serving is None:
            return
        server.cut()
        await self._serving


class _QuietServer(uvicorn.Server):
    """Run uvicorn without its signal handlers: there are several servers in one process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    def cut(self) -> None:
        """Stop without waiting for open requests."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # they are cut off on purpose
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.should_exit = self.force_exit = True


def _tls_options(tls: Tls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    required = ssl.CERT_NONE if tls.client_ca is None else ssl.CERT_REQUIRED
    files = {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key, "ssl_ca_certs": tls.client_ca}
    return {**files, "ssl_cert_reqs": required}


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
