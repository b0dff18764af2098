"""Reads the pages of one engine over HTTP, within bounds of time and size."""

import asyncio
import ipaddress
import ssl
from contextlib import suppress
from functools import partial
from typing import Final

import httpx

from dp_extproc.config.load import LoadSettings
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import Endpoint, in_url
from dp_extproc.engines.pages import ABSENT, FACTS_PATIENCE, ReaderError
from dp_extproc.engines.tls import refusal_of
from dp_extproc.fleet.discovery.answers import LookUpError
from dp_extproc.fleet.discovery.look_up_thread import LookUpThread
from dp_extproc.fleet.discovery.system_look_up import look_up_by_system

KEEPALIVE_SECONDS: Final = 4.0
"""Seconds that an idle connection is kept. They must be fewer than uvicorn's 5 (``timeout_keep_alive``): otherwise
engines close connections at the moment of their next use."""

_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context without certificates, for engines without TLS: loading certificates takes 20 ms."""
_HINT: Final = "is this an SGLang or vLLM server? Of an engine on several nodes, only the first node is"
"""The other nodes of SGLang answer health checks alone. A Service that selects them lists them as ready."""
_IF_CLOSED: Final = {
    "http": "; an engine that expects TLS does so, too",
    "https": "; an engine that requires another client certificate (engine_tls.cert) does so, too",
}
"""What else may be wrong if an engine closes a connection. It need not send the reason before."""
_ERROR_BYTES: Final = 65_536
"""Most bytes that are read of the answer to a POST."""


def make_client(tls: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """Make an HTTP client for one engine. It ignores the proxies of the environment.

    *tls* is for an engine whose URL is ``https://``. Each engine has a client of its own, since a request costs time
    for each connection of the client that sends it.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
    # httpx can only limit single reads, so whole answers are limited where they are read.
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False, verify=tls or _NO_TLS)  # noqa: S113 - see above


class EngineClient:
    """The HTTP client of one engine: an :class:`dp_extproc.engines.pages.EngineHttp`.

    Its methods raise :class:`dp_extproc.engines.pages.ReaderError` and no other exception.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: LoadSettings,
        client: httpx.AsyncClient,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.endpoint = endpoint
        self.address = ""
        """``IP:port`` of the engine, for this client and for Envoy; known after :meth:`resolve`."""
        self._scheme = endpoint.url.partition(":")[0]
        self._settings = settings
        self._client = client
        # A host name may have several addresses: read exactly the one that Envoy gets, under its name.
        self._headers = (
            (b"host", f"{in_url(endpoint.host)}:{endpoint.port}".encode()),
            (b"accept-encoding", b"identity"),
        )
        self._credentials = credentials
        self._name = LookUpThread(endpoint.host, partial(look_up_by_system, endpoint.host, endpoint.port))

    async def resolve(self) -> str:
        """Look up the address of the engine. IPv4 is preferred, and the present address is kept while it is valid."""
        self.address = f"{await self._look_up()}:{self.endpoint.port}"
        return self.address

    async def get(self, path: str, *, patience: float = 1.0, hint: str = _HINT) -> bytes:
        """Get a page; see :class:`dp_extproc.engines.pages.EngineHttp`."""
        seconds = self._settings.timeout * patience
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream("GET", self._url(path), headers=self._all_headers()) as response,
            ):
                return await self._receive(path, response, hint)
        except ReaderError:
            raise
        except (TimeoutError, httpx.TimeoutException):
            raise ReaderError(FailureKind.TIMEOUT, f"{path} was not answered within {seconds:g} s") from None
        except Exception as error:  # noqa: BLE001 - an answer, however odd, raises no other exception
            if (refusal := refusal_of(error)) is not None:
                raise ReaderError(FailureKind.TLS, refusal) from None
            if isinstance(error, httpx.ConnectError):
                message = f"no connection to {self.address}; is the engine running, and can it be reached from here?"
                kind = FailureKind.REFUSED if _is_refused(error) else FailureKind.UNREACHABLE
                raise ReaderError(kind, message) from None
            detail = str(error) or type(error).__name__
            if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
                detail += _IF_CLOSED[self._scheme]
            raise ReaderError(FailureKind.UNREADABLE, f"{path} got no complete HTTP answer: {detail}") from None

    async def post(
        self, path: str, body: bytes, header: tuple[str, str], *, patience: float = 1.0
    ) -> tuple[int, bytes] | None:
        """Post JSON; see :class:`dp_extproc.engines.pages.EngineHttp`. A long answer is truncated."""
        name, value = header
        headers = [*self._all_headers(), (b"content-type", b"application/json"), (name.encode(), value.encode())]
        with suppress(OSError, TimeoutError, httpx.HTTPError):
            async with (
                asyncio.timeout(self._settings.timeout * patience),
                self._client.stream("POST", self._url(path), headers=headers, content=body) as response,
            ):
                text = bytearray()
                async for chunk in response.aiter_raw():
                    text += chunk
                    if len(text) > _ERROR_BYTES:
                        break
                return response.status_code, bytes(text)
        return None

    def _url(self, path: str) -> str:
        return f"{self._scheme}://{self.address}{path}"

    def _all_headers(self) -> list[tuple[bytes, bytes]]:
        keys = self._credentials.headers(self.endpoint.pool)
        return [*self._headers, *((name.encode(), value) for name, value in keys)]

    async def _look_up(self) -> str:
        host = self.endpoint.host
        with suppress(ValueError):
            return in_url(str(ipaddress.ip_address(host)))
        try:
            async with asyncio.timeout(self._settings.timeout * FACTS_PATIENCE):
                found = await self._name.look_up()
        except TimeoutError:
            raise ReaderError(FailureKind.UNRESOLVABLE, f"{host} was not resolved in time") from None
        except LookUpError as error:
            raise ReaderError(FailureKind.UNRESOLVABLE, str(error)) from None
        addresses = [in_url(each.host) for each in found.addresses]
        if not addresses:
            raise ReaderError(FailureKind.UNRESOLVABLE, f"{host} has no address")
        present = self.address.rpartition(":")[0]
        return present if present in addresses else addresses[0]

    async def _receive(self, path: str, response: httpx.Response, hint: str) -> bytes:
        limit = self._settings.max_page_bytes
        if response.status_code != httpx.codes.OK:
            has_key = bool(self._credentials.headers(self.endpoint.pool))
            message = _explain(path, response.status_code, has_key=has_key, hint=hint)
            raise ReaderError(FailureKind.HTTP_STATUS, message, status=response.status_code)
        page = bytearray()
        # Raw bytes: an answer that is compressed against the request must not be expanded in memory.
        async for chunk in response.aiter_raw():
            page += chunk
            if len(page) > limit:
                raise ReaderError(FailureKind.TOO_LARGE, f"{path} is larger than load.max_page_bytes ({limit})")
        return bytes(page)


def _explain(path: str, status: int, *, has_key: bool, hint: str) -> str:
    message = f"{path} answered {status}"
    if status in {401, 403}:
        # With an API key, all pages but /metrics, /health and /ready need it (utils/auth.py).
        if has_key:
            return f"{message}: the engine refuses the API key of its pool; compare api_key with its --api-key"
        return f"{message}: the engine asks for an API key; tell the pool where it is: api_key: {{file: ...}}"
    return f"{message}: {hint}" if status in ABSENT else message


def _is_refused(error: BaseException | None) -> bool:
    """Return whether nothing listens at an address, by an error or by one of its causes."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None
