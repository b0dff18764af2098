"""Settings of Envoy's listener for clients, and of what Envoy reports about requests."""

import re
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from dp_extproc.config.listen import MAX_PORT
from dp_extproc.config.section import Seconds, Section, text_like
from dp_extproc.config.security import FilePath

_ORIGIN: Final = r"^(\*|[a-z][a-z0-9+.-]*://[^/\s*]+)$"
_HEADER: Final = r"^[A-Za-z0-9!#$&'*+.^_`|~-]+$"
_HOST_AND_PORT: Final = text_like("^[^/]+:[0-9]{1,5}$")


def host_and_port(value: str) -> str:
    """Check the address of a program that Envoy reaches.

    Raises:
        ValueError: It is no ``host:port``.
    """
    host, _, port = value.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ValueError("write host:port, such as dp-extproc:9002 or 10.0.0.9:9002, without a scheme")
    return value


Address = Annotated[str, AfterValidator(host_and_port), _HOST_AND_PORT]
"""``host:port`` of a program that Envoy reaches."""


def _origin(value: str) -> str:
    if not re.fullmatch(_ORIGIN, value):
        raise ValueError("write * for all, or an origin with its scheme and without a path: https://chat.example.com")
    return value


_Origin = Annotated[str, AfterValidator(_origin), text_like(_ORIGIN)]
_Header = Annotated[str, Field(pattern=_HEADER)]
_ALL: Final = "*"


class FrontDoorTls(Section):
    """TLS of the listener for clients. The files are in PEM, on Envoy's machine."""

    cert: FilePath = Field(examples=["/etc/envoy/tls.crt"])
    """The certificate with its intermediate certificates."""
    key: FilePath = Field(examples=["/etc/envoy/tls.key"])
    """The private key of the certificate."""
    client_ca: FilePath | None = Field(default=None, examples=["/etc/envoy/clients-ca.crt"])
    """CA bundle; if set, client certificates are required (mutual TLS)."""


class CorsSettings(Section):
    """Which web pages may send requests (Cross-Origin Resource Sharing). Envoy itself answers preflight requests."""

    allow_origins: Annotated[tuple[_Origin, ...], Field(min_length=1, strict=False)] = (_ALL,)
    """Origins of the pages, such as ``https://chat.example.com``; ``*`` allows all."""
    allow_headers: Annotated[tuple[_Header, ...], Field(strict=False)] = (_ALL,)
    """Request headers that pages may set; ``*`` allows all."""
    expose_headers: Annotated[tuple[_Header, ...], Field(strict=False)] = Field(default=(), examples=[["x-request-id"]])
    """Response headers that pages may read."""
    allow_credentials: bool = False
    """Whether pages may send cookies and client certificates."""
    max_age: Seconds = 600.0
    """Seconds for which a browser remembers the answer to a preflight request."""

    @model_validator(mode="after")
    def _has_no_credentials_for_all(self) -> Self:
        if self.allow_credentials and _ALL in self.allow_origins:
            raise ValueError("allow_credentials with the origin * would let every page act for its user; name origins")
        return self

    @property
    def allows_all_headers(self) -> bool:
        """Whether pages may set any request header."""
        return _ALL in self.allow_headers


class TracingSettings(Section):
    """Spans of requests, which Envoy exports by OpenTelemetry's protocol (OTLP over gRPC)."""

    collector: Address = Field(examples=["otel-collector:4317"])
    """``host:port`` of the collector."""
    service_name: Annotated[str, Field(min_length=1)] = "dp-extproc"
    """Name of the service that the spans have."""
    sampling: Annotated[float, Field(ge=0, le=1, strict=False)] = 1.0
    """Share of the traces that Envoy begins. In a trace of the client, the client's decision counts."""


class AccessLogSettings(Section):
    """Where Envoy writes the access log of requests and prefill legs. Several may be given."""

    stdout: bool = True
    """Whether lines of JSON go to the standard output of Envoy."""
    file: FilePath | None = Field(default=None, examples=["/var/log/envoy/access.log"])
    """File on Envoy's machine for lines of JSON."""
    grpc: Address | None = Field(default=None, examples=["log-collector:9003"])
    """``host:port`` of an access log service (ALS), which gets Envoy's own entries by gRPC."""
    otel: Address | None = Field(default=None, examples=["otel-collector:4317"])
    """``host:port`` of an OpenTelemetry collector, which gets log records by gRPC."""
