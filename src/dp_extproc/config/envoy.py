"""The section ``envoy``: settings of the printed Envoy configuration that no other section determines."""

import re
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from dp_extproc.config.front_door import (
    AccessLogSettings,
    Address,
    CorsSettings,
    FrontDoorTls,
    TracingSettings,
)
from dp_extproc.config.listen import SocketAddress, socket_address
from dp_extproc.config.section import Bytes, Seconds, Section, text_like
from dp_extproc.config.security import EngineTlsOfEnvoy, ServiceTls
from dp_extproc.contract import DESTINATION, RANK_HEADER, UNTRUSTED_PREFIXES

_HEADER: Final = re.compile(r"[a-z0-9!#$&'*+.^_`|~-]+")
"""Names of headers by RFC 9110, without the percent sign, which begins a command in Envoy's formats."""
_HEADER_NAME: Final = text_like("^[A-Za-z0-9!#$&'*+.^_`|~-]+$")
_NO_SESSION: Final = frozenset({
    # Credentials. Replicas publish the names of conversations.
    "authorization", "proxy-authorization", "cookie", "set-cookie", "api-key", "x-api-key", "x-auth-token",
    "x-goog-api-key", "x-amz-security-token",
    # Headers that frame a message, or belong to one connection (RFC 9110 and 9112).
    "host", "connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect",
    "content-length", "content-type", "content-encoding",
    RANK_HEADER, DESTINATION,  # Headers by which SGLang and gateways route.
})  # fmt: skip
"""Headers that cannot name a conversation."""


class BodyMode(StrEnum):
    """How Envoy sends request bodies to the service."""

    BUFFERED = "buffered"
    FULL_DUPLEX_STREAMED = "full_duplex_streamed"
    NONE = "none"
    """Envoy sends no bodies: the service schedules by headers, and the routing fields are headers."""


class TruncatedStreams(StrEnum):
    """How a stream ends if its decode engine is lost after the first token."""

    RESET = "reset"
    """Envoy's router resets the connection."""
    ERROR_EVENT = "error_event"
    """A filter in Envoy's WebAssembly runtime appends an error event."""


def _header_name(value: str) -> str:
    name = value.lower()
    if not _HEADER.fullmatch(name):
        raise ValueError("write the name of a request header, such as x-session-id")
    if name.startswith(UNTRUSTED_PREFIXES):
        raise ValueError("names under x-dp-, x-envoy- and x-override- are taken from clients; write another one")
    if name in _NO_SESSION:
        raise ValueError(f"{value} is not the name of a conversation; write a header that clients send for it")
    return name


class EnvoySettings(Section):
    """Settings of the printed Envoy configuration."""

    name_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$", max_length=40)] = Field(
        default="", examples=["llm_"]
    )
    """Beginning of all names of clusters and listeners. It keeps them apart from others in the same Envoy."""
    inference: SocketAddress = socket_address("127.0.0.1:8080")
    """Address for clients."""
    admin: SocketAddress = socket_address("127.0.0.1:9901")
    """Address of Envoy's own admin pages."""
    max_body_bytes: Bytes = 64 << 20
    """Largest request body. A larger one is refused with status 413."""
    request_headers_timeout: Seconds = 10.0
    """Seconds that a client has to send the headers of a request."""
    request_timeout: Seconds = 60.0
    """Seconds that a client has to send a whole request. The time of the response does not count."""
    body_mode: BodyMode = Field(default=BodyMode.BUFFERED, strict=False)
    service: Address | None = Field(default=None, examples=["dp-extproc:9002"])
    """``host:port`` of the service for Envoy; None stands for ``listen.grpc``."""
    session_header: Annotated[str, AfterValidator(_header_name), _HEADER_NAME] | None = Field(
        default=None, examples=["x-session-id"]
    )
    """Request header in which clients name a conversation."""
    standby: Annotated[tuple[Address, ...], Field(strict=False)] = Field(default=(), examples=[["10.0.0.9:9002"]])
    """``host:port`` of further services, in order. The first service that is ready gets all requests."""
    truncated_streams: TruncatedStreams = Field(default=TruncatedStreams.ERROR_EVENT, strict=False)
    service_tls: ServiceTls | None = None
    """TLS from Envoy to the service; required with ``listen.tls``."""
    engine_tls: EngineTlsOfEnvoy | None = None
    """Where Envoy gets what ``engine_tls`` names; None stands for files with the same paths on its machine."""
    secrets: Annotated[str, Field(pattern=r"^/[^\x00\r\n]*$")] | None = Field(
        default=None, examples=["/etc/envoy/secrets"]
    )
    """Directory on Envoy's machine for the printed files ``secret-*.yaml``, with which Envoy follows certificates.

    None stands for certificates that are read at Envoy's start.
    """
    tls: FrontDoorTls | None = None
    """TLS of the listener for clients, with HTTP/2 and HTTP/1.1; None for plain HTTP."""
    accept_http_10: bool = True
    """Whether clients may speak HTTP/1.0."""
    ipv4_compat: bool = True
    """Whether listeners on ``[::]`` accept IPv4, too."""
    cors: CorsSettings | None = CorsSettings()
    """Which web pages may send requests: all of them, as engines allow it. None leaves that to the engines."""
    tracing: TracingSettings | None = None
    """Spans of requests; None if there are none."""
    access_log: AccessLogSettings = AccessLogSettings()
