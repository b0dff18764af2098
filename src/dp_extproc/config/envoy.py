"""What the printed Envoy configuration contains, besides what follows from all other sections."""

import re
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from dp_extproc.config.listen import MAX_PORT, SocketAddress, socket_address
from dp_extproc.config.section import Bytes, Seconds, Section
from dp_extproc.config.security import ServiceTls
from dp_extproc.contract import DESTINATION, FOREIGN_PREFIXES, RANK_HEADER

_HEADER: Final = re.compile(r"[a-z0-9!#$&'*+.^_`|~-]+")
"""RFC 9110, but for the percent sign, which begins a command in Envoy's formats."""
_NO_SESSION: Final = frozenset({
    # Replicas tell each other what a conversation is called.
    "authorization", "proxy-authorization", "cookie", "set-cookie", "api-key", "x-api-key", "x-auth-token",
    "x-goog-api-key", "x-amz-security-token",
    # RFC 9110 and 9112: what frames a message, or belongs to one connection.
    "host", "connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect",
    "content-length", "content-type", "content-encoding",
    RANK_HEADER, DESTINATION,  # SGLang's and gateways': route
})  # fmt: skip
"""Headers with credentials, and headers that frame or route."""


class BodyMode(StrEnum):
    """How Envoy hands request bodies to the service."""

    BUFFERED = "buffered"
    FULL_DUPLEX_STREAMED = "full_duplex_streamed"
    NONE = "none"
    """Not at all: a request is placed by its headers, and headers tell the engines."""


def _host_and_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ValueError("write host:port, such as dp-extproc:9002 or 10.0.0.9:9002")
    return value


def _header_name(value: str) -> str:
    name = value.lower()
    if not _HEADER.fullmatch(name):
        raise ValueError("write the name of a request header, such as x-session-id")
    if name.startswith(FOREIGN_PREFIXES):
        raise ValueError("names under x-dp-, x-envoy- and x-override- are taken from clients; write another one")
    if name in _NO_SESSION:
        raise ValueError(f"{value} is not the name of a conversation; write a header that clients send for it")
    return name


class TruncatedStreams(StrEnum):
    """How a stream ends whose server is lost in mid-answer."""

    RESET = "reset"
    """As a connection that is cut, which is all that Envoy's router knows."""
    ERROR_EVENT = "error_event"
    """With an error event, by a filter of ours in Envoy's WebAssembly runtime."""


class EnvoySettings(Section):
    """What the printed Envoy configuration contains."""

    inference: SocketAddress = socket_address("127.0.0.1:8080")
    admin: SocketAddress = socket_address("127.0.0.1:9901")
    max_body_bytes: Bytes = 64 << 20
    request_headers_timeout: Seconds = 10.0
    """How long a client may take to send a request's headers ..."""
    request_timeout: Seconds = 60.0
    """... and all of it. How long the answer takes does not count."""
    body_mode: BodyMode = Field(default=BodyMode.BUFFERED, strict=False)
    service: Annotated[str, AfterValidator(_host_and_port)] | None = None
    """``host:port`` under which Envoy finds the service; by default ``listen.grpc``."""

    session_header: Annotated[str, AfterValidator(_header_name)] | None = None
    """Header in which clients name the conversation that a request belongs to."""
    standby: Annotated[tuple[Annotated[str, AfterValidator(_host_and_port)], ...], Field(strict=False)] = ()
    """Further services, each for when all before it are not ready. The first that is ready decides alone."""
    truncated_streams: TruncatedStreams = Field(default=TruncatedStreams.ERROR_EVENT, strict=False)
    service_tls: ServiceTls | None = None
    """Goes with ``listen.tls``."""
