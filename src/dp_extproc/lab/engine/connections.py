"""Keep HTTP clients for requests that stay open long.

httpx looks at every connection of a client whenever one is taken or given back, each time in turn for each: a few dozen
open requests cost more than everything else here. So each request has a client to itself, and clients are used again.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio.lowlevel
import httpx

_KEEPALIVE_SECONDS: Final = 3.0
"""Below the 5 s after which the bootstrap server closes an idle connection (uvicorn's ``timeout_keep_alive``): a
request into a connection that closes just then looks like a lost prefill engine."""


class Clients:
    """Hold idle clients, each with at most one connection."""

    def __init__(self, timeout: float) -> None:
        """Start without clients.

        Args:
            timeout: Timeout of requests in seconds, unless they have their own.
        """
        self._timeout = timeout
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used, but costly to make per client
        self._idle: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []

    @contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """Lend a client for one request at a time."""
        client = self._idle.pop() if self._idle else self._new()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def prepare(self) -> None:
        """Make the first client, and load its libraries, so that the first request does not wait for that."""
        with self.one():
            await anyio.lowlevel.checkpoint()

    async def close(self) -> None:
        for client in self._all:
            await client.aclose()

    def _new(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS)
        client = httpx.AsyncClient(timeout=self._timeout, limits=limits, verify=self._tls, trust_env=False)
        self._all.append(client)
        return client
