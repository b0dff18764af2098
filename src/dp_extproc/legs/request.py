"""What is sent to the engine of a prefill leg."""

import ssl

from msgspec import Struct

Headers = tuple[tuple[str, bytes], ...]


class LegRequest(Struct, frozen=True):
    """One prefill leg: a POST request to one engine."""

    address: str
    """``IP:port`` of the engine; an IPv6 address stands in brackets."""
    path: str
    """Path and query."""
    headers: Headers
    """All headers but ``host``, ``content-length`` and ``accept-encoding``. Names are in lower case."""
    preamble: bytes
    """The beginning of the body, which only this leg has."""
    tail: bytes | memoryview
    """The rest of the body, usually shared with the decode leg. It is never copied."""
    timeout: float
    """Seconds until the response headers have to be here. It bounds a leg that no other timeout ends."""
    rest_timeout: float = 30.0
    """Seconds that the response may take after its headers. Prefill computes one token, so no engine needs them."""
    tls: ssl.SSLContext | None = None
    """None for plain HTTP."""
