"""The section ``listen``: addresses of the service."""

import ipaddress
from contextlib import suppress
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, ConfigDict, Field, model_serializer, model_validator

from dp_extproc.config.section import Seconds, Section, or_short
from dp_extproc.config.security import ServerTls

MAX_PORT: Final = 65535
_ADDRESS: Final = r"^(([0-9]{1,3}\.){3}[0-9]{1,3}|\[?[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\]?):[0-9]{1,5}$"


def _ip_address(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("write an IP address, such as 127.0.0.1, 0.0.0.0 or ::1") from None


class SocketAddress(Section):
    """An ``IP:port`` to listen on. In the file a text, with IPv6 in brackets."""

    model_config = ConfigDict(json_schema_extra=or_short({"type": "string", "pattern": _ADDRESS}))

    host: Annotated[str, AfterValidator(_ip_address)]
    port: Annotated[int, Field(ge=0, le=MAX_PORT)]

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        if isinstance(value, str):
            host, _, port = value.rpartition(":")
            with suppress(ValueError):
                address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
                if port.isdecimal() and int(port) <= MAX_PORT:
                    return {"host": str(address), "port": int(port)}
        raise ValueError("write an IP address and a port, such as 127.0.0.1:9002, 0.0.0.0:9002 or [::1]:9002")

    @model_serializer(when_used="json")
    def _to_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_wildcard(self) -> bool:
        return ipaddress.ip_address(self.host).is_unspecified

    def shifted(self, ports: int) -> "SocketAddress":
        """Return the address with a port number that is higher by *ports*."""
        return self.model_copy(update={"port": self.port + ports})


def socket_address(text: str) -> SocketAddress:
    """Read the address of a default."""
    return SocketAddress.model_validate(text)


class ListenSettings(Section):
    """Addresses of the service, and how it treats connections."""

    grpc: SocketAddress = socket_address("127.0.0.1:9002")
    """Address for Envoy's ext_proc filter."""
    admin: SocketAddress = socket_address("127.0.0.1:9090")
    """Address of the pages ``/metrics``, ``/healthz``, ``/readyz`` and ``/loads``."""
    advertise: SocketAddress | None = Field(default=None, examples=["10.0.0.9:9002"])
    """Address at which Envoy reaches this process. None stands for ``grpc``, or for the host's address if ``grpc`` is a
    wildcard address."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of worker processes. Each has a gRPC port of its own, counted up from ``grpc`` and ``advertise``."""
    keepalive: Annotated[Seconds, Field(ge=0.1, le=86_400)] = 10.0
    """Seconds without data before either side pings the other, and seconds that the other side has to answer."""
    tls: ServerTls | None = None
    """TLS of the service; None stands for plain HTTP/2."""
    health: SocketAddress | None = Field(default=None, examples=["0.0.0.0:9003"])
    """Further address with gRPC health checks alone, without TLS; None for none. ``grpc`` has them, too."""

    @model_validator(mode="after")
    def _every_worker_has_its_port(self) -> Self:
        last = self.workers - 1
        for key, address in (("grpc", self.grpc), ("advertise", self.advertise)):
            if last and address is not None and not 0 < address.port <= MAX_PORT - last:
                ports = f"1-{MAX_PORT - last}"
                raise ValueError(f"{self.workers} workers take the ports from {key} on, so it has to be in {ports}")
        same_host = self.grpc.host == self.admin.host or self.grpc.is_wildcard or self.admin.is_wildcard
        if last and same_host and self.grpc.port <= self.admin.port <= self.grpc.port + last:
            taken = f"{self.grpc.port}-{self.grpc.port + last}"
            raise ValueError(f"{self.workers} workers take the ports {taken}; put admin on another one")
        if last and self.health is not None:
            raise ValueError("health is for one process; leave it out, or leave workers out")
        return self
