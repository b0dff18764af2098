"""Connections of clients, so close that they can be cut, and that it is known when a client cut them."""

import socket
import struct
from collections.abc import Callable
from typing import Final

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

_KEY: Final = "connection"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: close() sends RST (``socket(7)``)."""


class Connection(H11Protocol):
    """uvicorn's connection; whatever answers on it finds it by :func:`connection_of`."""

    on_lost: Callable[[], None] | None = None
    """Called if the client goes away."""

    def connection_made(self, transport: object) -> None:
        """Put itself where requests find it."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.app_state = {**self.app_state, _KEY: self}

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits for the end of an answer."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def reset(self) -> None:
        """Cut it with a RST."""
        self.on_lost = None
        sock: socket.socket = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()

    def write_and_close(self, data: bytes = b"") -> None:
        """Write past HTTP, and close."""
        self.on_lost = None
        self.transport.write(data)
        self.transport.close()


def connection_of(scope: Scope) -> Connection:
    """Give the connection of a request."""
    found: Connection = scope["state"][_KEY]
    return found
