"""TLS and API keys: names of files and variables, never the secrets themselves."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from dp_extproc.config.section import Section, is_given

_Path = Annotated[str, Field(min_length=1, pattern=r"^[^\x00\r\n]+$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")]


class ServerTls(Section):
    """TLS of the service: with a certificate of files, or with one that the service makes."""

    model_config = ConfigDict(
        json_schema_extra={
            "dependentRequired": {"cert": ["key"], "key": ["cert"]},
            "oneOf": [
                is_given("cert"),
                {"required": ["self_signed"], "properties": {"self_signed": {"not": {"const": False}}}},
            ],
        }
    )

    cert: _Path | None = Field(default=None, examples=["/etc/dp-extproc/tls.crt"])
    """The certificate with its intermediate certificates. Files are in PEM. Changed files are read again."""
    key: _Path | None = Field(default=None, examples=["/etc/dp-extproc/tls.key"])
    """The private key of the certificate."""
    self_signed: bool = False
    """Whether the service makes a certificate at its start, for gateways that require TLS and verify nothing."""
    client_ca: _Path | None = Field(default=None, examples=["/etc/dp-extproc/clients-ca.crt"])
    """CA bundle; if set, client certificates are required (mutual TLS)."""

    @model_validator(mode="after")
    def _has_one_certificate(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: write both, or neither")
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

    model_config = ConfigDict(json_schema_extra={"dependentRequired": {"cert": ["key"], "key": ["cert"]}})

    ca: _Path = Field(examples=["/etc/envoy/ca.crt"])
    """CA bundle for the certificate of the service."""
    name: _Name = Field(examples=["dp-extproc.llm.svc"])
    """DNS name in the certificates of all processes of the service. Envoy sends it as SNI and verifies it."""
    cert: _Path | None = Field(default=None, examples=["/etc/envoy/tls.crt"])
    """Envoy's own certificate, for ``listen.tls.client_ca``."""
    key: _Path | None = Field(default=None, examples=["/etc/envoy/tls.key"])
    """The private key of ``cert``."""

    @model_validator(mode="after")
    def _has_a_pair(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: write both, or neither")
        return self


class ApiKeySource(Section):
    """Where the API key of a pool's engines is: in an environment variable, or in a file."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [is_given("env"), is_given("file")]})

    env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, examples=["ENGINE_API_KEY"]
    )
    """Name of the variable that has the key."""
    file: _Path | None = Field(default=None, examples=["/run/secrets/engine-api-key"])
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
