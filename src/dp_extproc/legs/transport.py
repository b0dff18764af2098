"""One HTTP exchange with the engine of a prefill leg, by aiohttp."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from dp_extproc.legs.listener import ResendCause
from dp_extproc.legs.request import LegRequest

CONNECT_SECONDS: Final = 2.0
KEEPALIVE_SECONDS: Final = 4.0
"""Seconds that an idle connection is kept. They must be fewer than uvicorn's 5 (``timeout_keep_alive``)."""
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


class _Body(aiohttp.Payload):
    """Two buffers, written one after the other."""

    def __init__(self, request: LegRequest) -> None:
        super().__init__(request)
        self._size = request.content_length

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002 - the signature is aiohttp's
        raise TypeError

    async def write(self, writer: AbstractStreamWriter) -> None:
        await writer.write(self._value.preamble)
        await writer.write(self._value.tail)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:  # noqa: ARG002
        await self.write(writer)


class Answer:
    """A response whose headers are here."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.is_empty = response.content.at_eof()
        """Whether no body follows."""
        self.is_events = response.headers.get("content-type", "").lower().startswith("text/event-stream")

    async def read(self) -> bytes:
        """Read a piece of the body; empty at its end."""
        try:
            return await self._response.content.readany()
        except aiohttp.ClientError as error:
            raise BrokenError(str(error) or type(error).__name__) from None


class Transport:
    """The connections to all engines."""

    def __init__(self) -> None:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        self._kept = _session(keepalive_timeout=KEEPALIVE_SECONDS, tracing=tracing)
        self._fresh = _session(force_close=True, tracing=tracing)

    @asynccontextmanager
    async def exchange(self, request: LegRequest, *, is_fresh: bool) -> AsyncIterator[Answer]:
        """Send a request, and give its response.

        Args:
            request: The request.
            is_fresh: Whether it needs a connection of its own, because one that was kept open has failed.

        Raises:
            NotSentError: The engine has not got the request.
            BrokenError: The connection broke, or breaks while the response is read.
            UnreadableError: The response is no HTTP.
        """
        session = self._fresh if is_fresh else self._kept
        connection: dict[str, bool] = {}
        scheme = "http" if request.tls is None else "https"
        try:
            response = await session.post(
                URL(f"{scheme}://{request.address}{request.path}", encoded=True),
                data=_Body(request),
                headers=_headers(request),
                allow_redirects=False,
                ssl=request.tls or True,
                server_hostname=request.certificate_name,
                trace_request_ctx=connection,
            )
        except aiohttp.ConnectionTimeoutError:
            raise NotSentError(f"no connection within {CONNECT_SECONDS:g} s") from None
        except aiohttp.ClientConnectorError as error:
            cause = None if isinstance(error, aiohttp.ClientSSLError) else ResendCause.REFUSED
            raise NotSentError(error.strerror or str(error), cause) from None
        except aiohttp.ServerDisconnectedError as error:
            is_stale = "is_reused" in connection and isinstance(error.message, str)
            raise _broken(error, is_stale=is_stale) from None
        except aiohttp.ClientResponseError as error:
            raise UnreadableError(error.message) from None
        except aiohttp.ClientConnectionError as error:
            raise _broken(error, is_stale="is_reused" in connection) from None
        except aiohttp.ClientError as error:
            raise BrokenError(str(error)) from None
        async with response:
            yield Answer(response)

    async def close(self) -> None:
        """Close all connections."""
        await self._kept.close()
        await self._fresh.close()


def _broken(error: Exception, *, is_stale: bool) -> Exception:
    message = str(error) or type(error).__name__
    return NotSentError(message, ResendCause.STALE) if is_stale else BrokenError(message)


def _headers(request: LegRequest) -> list[tuple[str, str]]:
    return [
        ("host", request.host or request.address),
        ("accept-encoding", "identity"),
        ("content-length", str(request.content_length)),
        *((name, value.decode("latin-1")) for name, value in request.headers),
    ]


async def _note_reuse(_session: Any, context: Any, _params: Any) -> None:
    context.trace_request_ctx["is_reused"] = True


def _session(*, tracing: aiohttp.TraceConfig, **options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, use_dns_cache=False, loop=asyncio.get_running_loop(), **options),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_AUTOMATIC,
        auto_decompress=False,
        trust_env=False,
        trace_configs=[tracing],
    )
