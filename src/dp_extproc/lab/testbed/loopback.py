"""Send HTTP requests to processes of the test bed, from any number of threads."""

import ssl
import threading
from typing import Final

import httpx

_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For URLs that are not ``https``. Loading the certificates that verify peers costs 50 ms of a processor for each
client."""


class _ConnectionsPerThread(httpx.BaseTransport):
    """Keep the connections of each thread apart.

    httpcore (1.0.9) closes a connection that is idle and readable, as its server must have closed it. Between its two
    checks another thread may have sent a request there; what is readable is its answer then, and that thread gets
    EBADF. Of 200 requests at once one in a thousand did on a busy machine.
    """

    def __init__(self, limits: httpx.Limits, tls: ssl.SSLContext) -> None:
        self._limits = limits
        self._tls = tls
        self._own = threading.local()
        self._all: list[httpx.HTTPTransport] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        own: httpx.HTTPTransport | None = getattr(self._own, "transport", None)
        if own is None:
            own = self._own.transport = httpx.HTTPTransport(verify=self._tls, trust_env=False, limits=self._limits)
            self._all.append(own)
        return own.handle_request(request)

    def close(self) -> None:
        for transport in self._all:
            transport.close()


def client(
    base_url: str = "", *, timeout: float | None = 30.0, keeps_connections: bool = True, tls: ssl.SSLContext = _TLS
) -> httpx.Client:
    """Make a client.

    Args:
        base_url: What paths are relative to.
        timeout: Seconds that connecting, sending or the next byte may take; None for ever.
        keeps_connections: Whether they are used again. Where servers come and go on one port they must not be.
        tls: For ``https`` URLs.
    """
    limits = httpx.Limits() if keeps_connections else httpx.Limits(max_keepalive_connections=0)
    transport = _ConnectionsPerThread(limits, tls)
    return httpx.Client(base_url=base_url, timeout=timeout, transport=transport, trust_env=False)


CLIENT: Final = client(timeout=5.0, keeps_connections=False)
