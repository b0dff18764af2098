"""One HTTP exchange with the engine of a prefill leg, by aiohttp."""

import socket
from contextvars import ContextVar
from typing import Any, Final, Self
from weakref import WeakSet

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from dp_extproc.legs.listener import ResendCause
from dp_extproc.legs.request import LegRequest

CONNECT_SECONDS: Final = 2.0
KEEPALIVE_SECONDS: Final = 4.0
"""Seconds that an idle connection is kept. They must be fewer than uvicorn's 5 (``timeout_keep_alive``)."""
SMALL: Final = 65_536
"""Bytes below which a body is sent in one piece: copying them costs less than a second system call."""
_RECEIVE_BYTES: Final = 65_536
"""Receive buffer of a connection. With a large one, endless small messages would block the event loop for seconds:
libuv reads up to 32 times without a pause (``uv__read``), as long as each read fills its own buffer."""
_AUTOMATIC: Final = ("User-Agent", "Accept", "Content-Type")


class NotSentError(Exception):
    """The engine has not got the request."""

    def __init__(self, message: str, cause: ResendCause | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        """Why it may be sent again; None if it must not."""


class BrokenError(Exception):
    """The connection broke, and the engine may have got the request."""


class UnreadableError(Exception):
    """The response is no HTTP, or too large."""


class Body:
    """The body of a leg in two buffers, until it cannot be needed any more."""

    def __init__(self, *parts: bytes | memoryview) -> None:
        self.size = sum(map(len, parts))
        self.parts: tuple[bytes | memoryview, ...] | None = parts

    def release(self) -> None:
        """Free the memory. The request cannot be sent again."""
        self.parts = None


class _Payload(aiohttp.Payload):
    """The body as aiohttp writes it. Large buffers are not joined, and not kept when they are written."""

    def __init__(self, body: Body) -> None:
        super().__init__(None)
        self._size = body.size
        self._parts = body.parts or ()

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002 - the signature is aiohttp's
        raise TypeError

    async def write(self, writer: AbstractStreamWriter) -> None:
        parts, self._parts = self._parts, ()
        if sum(map(len, parts)) < SMALL:
            parts = (b"".join(parts),)
        for part in parts:
            await writer.write(part)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:  # noqa: ARG002
        await self.write(writer)


class Answer:
    """A response whose headers are here. Its connection is kept if the whole of it was read, else closed."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.is_empty = response.content.at_eof()
        """Whether no body follows."""
        self.is_events = response.headers.get("content-type", "").lower().startswith("text/event-stream")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.release()

    async def read(self) -> bytes:
        """Read a piece of the body; empty at its end."""
        try:
            return await self._response.content.readany()
        except aiohttp.ClientError as error:
            raise BrokenError(str(error) or type(error).__name__) from None


class Transport:
    """The connections to all engines."""

    def __init__(self) -> None:
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        """By whether each request has a connection of its own. A session is made for its first request."""

    async def send(self, request: LegRequest, body: Body, *, is_fresh: bool) -> Answer:
        """Send a request, and give its response, which is a context manager.

        Args:
            request: The request, without its body.
            body: The body.
            is_fresh: Whether it needs a connection of its own, because one that was kept open has failed.

        Raises:
            NotSentError: The engine has not got the request.
            BrokenError: The connection broke.
            UnreadableError: The response is no HTTP.
        """
        session = self._sessions.get(is_fresh)
        if session is None:
            options = {"force_close": True} if is_fresh else {"keepalive_timeout": KEEPALIVE_SECONDS}
            session = self._sessions[is_fresh] = _session(**options)
        _is_reused.set(False)
        scheme = "http" if request.tls is None else "https"
        try:
            response = await session.post(
                URL(f"{scheme}://{request.address}{request.path}", encoded=True),
                data=_Payload(body),
                headers=_headers(request, body),
                allow_redirects=False,
                ssl=request.tls or True,
            )
        except aiohttp.ConnectionTimeoutError:
            raise NotSentError(f"no connection within {CONNECT_SECONDS:g} s") from None
        except aiohttp.ClientConnectorError as error:
            cause = None if isinstance(error, aiohttp.ClientSSLError) else ResendCause.REFUSED
            raise NotSentError(error.strerror or str(error), cause) from None
        except aiohttp.ServerDisconnectedError as error:
            is_stale = _is_reused.get() and isinstance(error.message, str)
            raise _broken(error, is_stale=is_stale) from None
        except aiohttp.ClientResponseError as error:
            raise UnreadableError(error.message) from None
        except aiohttp.ClientConnectionError as error:
            raise _broken(error, is_stale=_is_reused.get()) from None
        except aiohttp.ClientError as error:
            raise BrokenError(str(error)) from None
        return Answer(response)

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()


def _broken(error: Exception, *, is_stale: bool) -> Exception:
    message = str(error) or type(error).__name__
    return NotSentError(message, ResendCause.STALE) if is_stale else BrokenError(message)


def _headers(request: LegRequest, body: Body) -> list[tuple[str, str]]:
    return [
        ("host", request.address),
        ("accept-encoding", "identity"),
        ("content-length", str(body.size)),
        *((name, value.decode(errors="replace")) for name, value in request.headers),
    ]


def _make_socket(address: Any) -> socket.socket:
    """Make a socket that lets the event loop have its turn after each of its receive buffers."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)  # noqa: FBT003 - the signature is Python's
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    return made


_is_reused: ContextVar[bool] = ContextVar("is_reused")
"""Whether the connection of the last request of the present task had carried another before."""


class _Connector(aiohttp.TCPConnector):
    """Notes which requests get a connection that was kept open."""

    def __init__(self, **options: Any) -> None:
        # No limit: legs wait for their peers, so one that waits for a connection could wait for ever.
        super().__init__(limit=0, use_dns_cache=False, socket_factory=_make_socket, **options)
        self._known: WeakSet[object] = WeakSet()

    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        connection = await super().connect(*args, **kwargs)
        protocol = connection.protocol
        assert protocol is not None  # noqa: S101 - it was not released yet
        _is_reused.set(protocol in self._known)
        self._known.add(protocol)
        return connection


def _session(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=_Connector(**options),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_AUTOMATIC,
        auto_decompress=False,
        trust_env=False,
    )
