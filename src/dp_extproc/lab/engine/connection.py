"""Give handlers the connection of their client, to reset it, and to notice when the client closes it."""

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
    """Extend uvicorn's connection; :func:`connection_of` returns it to a handler."""

    on_lost: Callable[[], None] | None = None
    """Called if the client closes the connection."""

    def connection_made(self, transport: object) -> None:
        """Put the connection into the state of its requests."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.app_state = {**self.app_state, _KEY: self}

    def connection_lost(self, exc: Exception | None) -> None:
        """Call the function that waits for the end of an answer."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def reset(self) -> None:
        """Close the connection with a RST."""
        self.on_lost = None
        sock: socket.socket = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()

    def write_and_close(self, data: bytes = b"") -> None:
        """Write bytes past HTTP, and close."""
        self.on_lost = None
        self.transport.write(data)
        self.transport.close()


def connection_of(scope: Scope) -> Connection:
    """Return the connection of a request."""
    found: Connection = scope["state"][_KEY]
    return found
