"""TLS and API keys: names of files and variables, never the secrets themselves."""

import re
from typing import Annotated, Final, Protocol, Self, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from dp_extproc.config.section import JsonSchema, Section, is_given, text_like

FilePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00\r\n]+$")]
"""Path of a file."""
_DNS_NAME: Final = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?"
_Name = Annotated[str, Field(pattern=f"^{_DNS_NAME}$")]
_NAME: Final = rf"^([a-z][a-z0-9+.-]*://[\x21-\x7e]+|(?![0-9.]+$){_DNS_NAME})$"
"""A name in a certificate. An IP address there is no DNS name, and is not compared."""
_PAIR: Final[JsonSchema] = {"dependentRequired": {"cert": ["key"], "key": ["cert"]}}
"""JSON Schema of a section with a certificate that may be left out."""
_HAS_FILE: Final[JsonSchema] = {"anyOf": [is_given("ca"), is_given("cert")]}


class _MayHavePair(Protocol):
    @property
    def cert(self) -> str | None: ...
    @property
    def key(self) -> str | None: ...


P = TypeVar("P", bound=_MayHavePair)


def _check_pair(section: P) -> P:
    if (section.cert is None) != (section.key is None):
        raise ValueError("cert and key belong together: write both, or neither")
    return section


def is_uri(name: str) -> bool:
    """Return whether a name in a certificate is a URI, and no DNS name."""
    return "://" in name


def _name(value: str) -> str:
    if not re.fullmatch(_NAME, value):
        raise ValueError(
            "write a DNS name, such as engine.llm.svc, or a URI, such as spiffe://cluster.local/ns/llm; "
            "IP addresses in certificates are not compared"
        )
    return value


_CertificateName = Annotated[str, AfterValidator(_name), text_like(_NAME)]


class ServerTls(Section):
    """TLS of the service: with a certificate of files, or with one that the service makes."""

    model_config = ConfigDict(
        json_schema_extra={
            **_PAIR,
            "oneOf": [
                is_given("cert"),
                {"required": ["self_signed"], "properties": {"self_signed": {"not": {"const": False}}}},
            ],
        }
    )

    cert: FilePath | None = Field(default=None, examples=["/etc/dp-extproc/tls.crt"])
    """The certificate with its intermediate certificates. Files are in PEM. Changed files are read again."""
    key: FilePath | None = Field(default=None, examples=["/etc/dp-extproc/tls.key"])
    """The private key of the certificate."""
    self_signed: bool = False
    """Whether the service makes a certificate at its start, for gateways that require TLS and verify nothing."""
    client_ca: FilePath | None = Field(default=None, examples=["/etc/dp-extproc/clients-ca.crt"])
    """CA bundle; if set, client certificates are required (mutual TLS)."""

    _has_a_pair = model_validator(mode="after")(_check_pair)

    @model_validator(mode="after")
    def _has_one_certificate(self) -> Self:
        if (self.cert is None) != self.self_signed:
            raise ValueError("write either cert and key, or self_signed: true")
        return self

    @property
    def files(self) -> dict[str, str]:
        """Every file, by its key in the section."""
        found = {"cert": self.cert, "key": self.key, "client_ca": self.client_ca}
        return {key: path for key, path in found.items() if path is not None}


class ServiceTls(Section):
    """TLS from Envoy to the service. The files are on Envoy's machine."""

    model_config = ConfigDict(json_schema_extra=_PAIR)

    ca: FilePath = Field(examples=["/etc/envoy/ca.crt"])
    """CA bundle for the certificate of the service."""
    name: _Name = Field(examples=["dp-extproc.llm.svc"])
    """DNS name in the certificates of all processes of the service. Envoy sends it as SNI and verifies it."""
    cert: FilePath | None = Field(default=None, examples=["/etc/envoy/tls.crt"])
    """Envoy's own certificate, for ``listen.tls.client_ca``."""
    key: FilePath | None = Field(default=None, examples=["/etc/envoy/tls.key"])
    """The private key of ``cert``."""

    _has_a_pair = model_validator(mode="after")(_check_pair)


class EngineTls(Section):
    """TLS to the engines of all pools, whose URLs are then ``https://``.

    The files are in PEM, on the service's machine. Changed files are read again for new connections.
    """

    model_config = ConfigDict(json_schema_extra=_PAIR)

    ca: FilePath = Field(examples=["/etc/dp-extproc/engines-ca.crt"])
    """CA bundle for the certificates of engines."""
    names: Annotated[tuple[_CertificateName, ...], Field(min_length=1, strict=False)] = Field(
        examples=[["engine.llm.svc"]]
    )
    """DNS names or URIs, such as SPIFFE IDs. The certificate of an engine must have one of them."""
    sni: _Name | None = Field(default=None, examples=["engine.llm.svc"])
    """Name that is sent as SNI. None stands for the first DNS name in ``names``, and for no SNI without one."""
    cert: FilePath | None = Field(default=None, examples=["/etc/dp-extproc/client.crt"])
    """The certificate that engines require of their clients."""
    key: FilePath | None = Field(default=None, examples=["/etc/dp-extproc/client.key"])
    """The private key of ``cert``."""

    _has_a_pair = model_validator(mode="after")(_check_pair)

    @property
    def sent_name(self) -> str | None:
        """The name that is sent as SNI; None for no SNI."""
        return self.sni or next((name for name in self.names if not is_uri(name)), None)

    @property
    def files(self) -> dict[str, str]:
        """Every file, by its key in the section."""
        given = {"ca": self.ca, "cert": self.cert, "key": self.key}
        return {key: path for key, path in given.items() if path is not None}


class SdsSettings(Section):
    """Certificates that another program serves to Envoy, such as the agent of a mesh (Secret Discovery Service)."""

    cluster: Annotated[str, Field(min_length=1)] = Field(examples=["sds-grpc"])
    """The cluster in Envoy's own configuration that leads to the program, by gRPC."""
    ca: Annotated[str, Field(min_length=1)] = Field(examples=["ROOTCA"])
    """Name of the secret with the CA bundle."""
    certificate: Annotated[str, Field(min_length=1)] | None = Field(default=None, examples=["default"])
    """Name of the secret with Envoy's own certificate and key."""


class EngineTlsOfEnvoy(Section):
    """Where Envoy gets what ``engine_tls`` names: files on its own machine, or secrets of another program."""

    model_config = ConfigDict(json_schema_extra={**_PAIR, "not": {"allOf": [is_given("sds"), _HAS_FILE]}})

    ca: FilePath | None = Field(default=None, examples=["/etc/envoy/engines-ca.crt"])
    """CA bundle for the certificates of engines. None stands for ``engine_tls.ca``."""
    cert: FilePath | None = Field(default=None, examples=["/etc/envoy/client.crt"])
    """Envoy's own certificate for engines. None stands for ``engine_tls.cert``."""
    key: FilePath | None = Field(default=None, examples=["/etc/envoy/client.key"])
    """The private key of ``cert``. None stands for ``engine_tls.key``."""
    sds: SdsSettings | None = None
    """Secrets in place of files."""

    _has_a_pair = model_validator(mode="after")(_check_pair)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if self.sds is not None and (self.ca or self.cert):
            raise ValueError("write either sds or files, since each of them is everything that Envoy needs")
        return self


class ApiKeySource(Section):
    """Where the API key of a pool's engines is: in an environment variable, or in a file."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [is_given("env"), is_given("file")]})

    env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, examples=["ENGINE_API_KEY"]
    )
    """Name of the variable that has the key."""
    file: FilePath | None = Field(default=None, examples=["/run/secrets/engine-api-key"])
    """Path of the file that has the key. A changed file is read again."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.env is None) == (self.file is None):
            raise ValueError("write either env: NAME_OF_A_VARIABLE or file: /path/to/it, never the key itself")
        return self

    @property
    def place(self) -> str:
        """Name of the source in messages."""
        return f"the variable {self.env}" if self.file is None else f"the file {self.file}"
