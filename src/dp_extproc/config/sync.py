"""The section ``sync``: the bus on which replicas publish their reservations."""

from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from dp_extproc.config.section import Seconds, Section, text_like

_MAX_DIRECTORY: Final = 80
"""Most bytes of the directory. The path of a Unix socket has 107 at most (``sun_path``), its name included."""
_LEAST_TIMEOUT: Final = 1.0
"""Shortest ``peer_timeout``, in seconds: twice the time between two heartbeats, so that one may be lost."""
_TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})
"""Options of the Redis client that the query of the URL may have."""
_REMEDY: Final = (
    "write redis://host:port, rediss://host:port (TLS) or unix:///directory; user and password go before the host as "
    "user:password@, with characters such as @ : / # ? as %40 %3A %2F %23 %3F"
)


class SyncSettings(Section):
    """The bus between replicas. No message shows the URL, which may contain a password."""

    url: Annotated[SecretStr, text_like("^(rediss?://.|unix:///).*$")] = Field(examples=["redis://10.0.0.7:6379"])
    """``redis://[user:password@]host:port``, ``rediss://...`` for TLS, or ``unix:///directory`` for processes of one
    machine."""
    channel: Annotated[str, Field(pattern=r"^\S+$")] = "dp-extproc"
    """Channel on Redis. Fleets that share a Redis server have different channels."""
    peer_timeout: Seconds = 3.0
    """Seconds without a message after which a replica counts as gone and its reservations end."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be a mapping with the key url, such as {url: redis://host:6379}")  # noqa: TRY004
        return value

    @field_validator("url", mode="before")
    @classmethod
    def _names_a_bus(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(_REMEDY)  # noqa: TRY004 - pydantic reports only this as a problem of the file
        try:
            parts = urlsplit(value)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError(_REMEDY) from None
        if parts.scheme == "unix":
            if host or parts.query or parts.fragment or not parts.path.startswith("/"):
                raise ValueError("write unix:///directory, with an absolute path and nothing behind it")
            if len(parts.path.encode()) > _MAX_DIRECTORY:
                raise ValueError(f"a Unix socket's directory has at most {_MAX_DIRECTORY} bytes; choose a shorter one")
            return value
        is_database = (parts.path.strip("/") or "0").isdecimal()
        if parts.scheme not in {"redis", "rediss"} or not host or parts.fragment or port == 0 or not is_database:
            raise ValueError(_REMEDY)
        options = {option.partition("=")[0] for option in parts.query.split("&") if option}
        if options - (_TLS_OPTIONS if parts.scheme == "rediss" else set()):
            raise ValueError(f"the URL's query may have {', '.join(sorted(_TLS_OPTIONS))}, and with rediss:// only")
        return value

    @field_validator("peer_timeout")
    @classmethod
    def _is_longer_than_a_heartbeat(cls, value: float) -> float:
        if value < _LEAST_TIMEOUT:
            raise ValueError("write 1s or more; a replica with nothing to tell speaks twice a second")
        return value

    @property
    def directory(self) -> str | None:
        """Directory of the sockets, if the bus is one of this host; else None."""
        parts = urlsplit(self.url.get_secret_value())
        return parts.path if parts.scheme == "unix" else None
