"""Pools: models, endpoints, and the policy by which a pool places requests."""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from dp_extproc.config.discovery import DnsSettings, FileSettings, Group, KubernetesSettings, OneOrMore
from dp_extproc.config.groups import GroupSettings
from dp_extproc.config.listen import MAX_PORT
from dp_extproc.config.problems import Key
from dp_extproc.config.section import Host, JsonSchema, Section, is_given, or_short, text_like
from dp_extproc.config.security import ApiKeySource

_HOST: Final = re.compile(r"[A-Za-z0-9._:%\-]+")
_URL: Final = r"^https?://([A-Za-z0-9._%-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}/?$"


SCHEMES: Final = ("http", "https")
"""Schemes of the URLs of engines, without and with ``engine_tls``."""


def why_not(url: str, *, has_tls: bool) -> str | None:
    """Explain why an endpoint has the wrong scheme; None if it has the right one.

    There is one for the engines of all pools, since Envoy dials all of them through the same clusters.
    """
    if url.startswith(f"{SCHEMES[has_tls]}://"):
        return None
    if has_tls:
        return (
            "engine_tls applies to the engines of all pools: write https://; engines without TLS need a dp-extproc of "
            "their own, which may have the same Envoy (envoy.name_prefix)"
        )
    return "https:// needs the section engine_tls: {ca: FILE, names: [NAME]}, which applies to the engines of all pools"


class EngineKind(StrEnum):
    """Kind of the engines of a pool, as configured."""

    AUTO = "auto"
    """An engine that answers /server_info is SGLang, one that answers /version is vLLM."""
    SGLANG = "sglang"
    VLLM = "vllm"


class RoutingFields(StrEnum):
    """Where the routing fields of a disaggregated pool go."""

    BODY = "body"
    HEADERS = "headers"
    """Into ``x-override-*`` headers, or into the body where headers cannot carry them."""


class HostPolicy(StrEnum):
    """How the endpoint of a leg is picked."""

    LOCKSTEP = "lockstep"
    """The endpoint where the request adds the least time to the steps of all requests."""
    LEAST_TOKENS = "least_tokens"
    """The endpoint that has the rank with the fewest tokens."""
    LEAST_REQUESTS = "least_requests"
    """The endpoint with the fewest requests in flight per rank."""
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    POWER_OF_TWO = "power_of_two"
    """Of two random endpoints the one with fewer tokens."""


class RankPolicy(StrEnum):
    """How the DP rank of the picked endpoint is picked."""

    MINIMUM_TOKENS = "minimum_tokens"
    """The rank with the fewest tokens."""
    TOKEN_ROUND_ROBIN = "token_round_robin"  # noqa: S105 - no password
    """The rank that was sent the fewest tokens so far."""
    NONE = "none"
    """The engine picks."""


class ClientRanks(StrEnum):
    """What happens to DP ranks in a client's body."""

    REPLACE = "replace"
    HONOUR = "honour"


class AffinitySettings(Section):
    """How requests find ranks with their prefix in the cache."""

    prefixes: bool = True
    """Whether prompts are compared with earlier ones."""
    sessions: bool = True
    """Whether a prompt is compared with the last one of its conversation, which ``envoy.session_header`` names."""


class PolicySettings(Section):
    """How endpoints and ranks of a pool are picked."""

    host: HostPolicy = Field(default=HostPolicy.LOCKSTEP, strict=False)
    dp_rank: RankPolicy = Field(default=RankPolicy.MINIMUM_TOKENS, strict=False)
    client_dp_rank: ClientRanks = Field(default=ClientRanks.REPLACE, strict=False)
    affinity: AffinitySettings = AffinitySettings()


class EndpointConfig(Section):
    """One endpoint. In the file a URL, or a mapping with ``url`` and values that replace discovered ones."""

    model_config = ConfigDict(json_schema_extra=or_short({"type": "string", "pattern": _URL}))

    url: Annotated[str, text_like(_URL)] = Field(examples=["http://10.0.0.1:30000"])
    """Address of the engine."""
    bootstrap_port: Annotated[int, Field(ge=1, le=MAX_PORT)] | None = Field(default=None, examples=[8998])
    """Port of the bootstrap server of a prefill engine. Discovered from the engine."""
    bootstrap_host: Host | None = Field(default=None, examples=["10.0.0.1"])
    """Name or address at which decode engines reach the bootstrap server. None stands for the host in ``url``."""
    dp_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(default=None, examples=[8])
    """Number of DP ranks. Discovered from the engine."""
    dp_rank: Annotated[int, Field(ge=0, lt=4096)] | None = Field(default=None, examples=[0])
    """The rank behind this URL, if the engine has a listener for each rank."""
    group: Group | None = Field(default=None, examples=["v2"])
    """Revision group: prefill and decode endpoints of two groups are never paired."""

    @model_validator(mode="after")
    def _rank_is_one_of_its_engine(self) -> Self:
        if self.dp_rank is not None and self.dp_size is not None and self.dp_rank >= self.dp_size:
            raise ValueError(f"dp_rank {self.dp_rank} is not one of the {self.dp_size} ranks (they count from 0)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        is_http = parts.scheme in SCHEMES
        if not is_http or not host or parts.path.strip("/") or parts.query or parts.fragment or "@" in value:
            raise ValueError("write the engine's address as http://host:port, without a path")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name or an IP address")
        if not port:
            raise ValueError("name the engine's port: http://host:port")
        return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0  # every URL has one


class EndpointSources(Section):
    """The sources of the endpoints of one role. Several may be combined."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    endpoints: Annotated[tuple[EndpointConfig, ...], Field(min_length=1, strict=False)] = ()
    """A list of endpoints. Each is a URL, or a mapping with ``url`` and values that replace discovered ones."""
    dns: Annotated[tuple[DnsSettings, ...], *OneOrMore] = ()
    file: Annotated[tuple[FileSettings, ...], *OneOrMore] = ()
    kubernetes: Annotated[tuple[KubernetesSettings, ...], *OneOrMore] = ()

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if not (self.endpoints or self.dns or self.file or self.kubernetes):
            raise ValueError("names no endpoints; write endpoints, dns, file or kubernetes")
        return self


_ONE_SHAPE: Final[JsonSchema] = {
    "oneOf": [
        {**is_given("workers"), "not": {"anyOf": [is_given("prefill"), is_given("decode")]}},
        {"allOf": [is_given("prefill"), is_given("decode")], "not": is_given("workers")},
    ]
}
"""JSON Schema of the two shapes of a pool."""


class PoolConfig(Section):
    """The endpoints of one or more models: ``prefill`` and ``decode``, or ``workers`` alone."""

    model_config = ConfigDict(json_schema_extra=_ONE_SHAPE)

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)] = Field(
        examples=[["*"]]
    )
    """Names that are compared with the model of a request. ``*`` stands for every model that no other pool names."""
    prefill: EndpointSources | None = None
    """Prefill endpoints of a disaggregated pool. Several sources may be combined."""
    decode: EndpointSources | None = Field(default=None, examples=[{"endpoints": ["http://10.0.1.1:30000"]}])
    """Decode endpoints of a disaggregated pool, with the same keys as ``prefill``."""
    workers: EndpointSources | None = Field(default=None, examples=[{"endpoints": ["http://10.0.0.1:30000"]}])
    """Endpoints of an aggregated pool, whose engines do both. They stand in place of ``prefill`` and ``decode``."""
    engine: EngineKind = Field(default=EngineKind.AUTO, strict=False)
    routing_fields: RoutingFields = Field(default=RoutingFields.BODY, strict=False)
    policy: PolicySettings = PolicySettings()
    groups: GroupSettings = GroupSettings()
    api_key: ApiKeySource | None = None
    """The key with which the engines were started (``--api-key``); None if there is none."""

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        disaggregated = self.prefill is not None and self.decode is not None
        if self.workers is not None and (self.prefill or self.decode):
            raise ValueError("a pool has either prefill and decode, or workers; split this one in two pools")
        if self.workers is None and not disaggregated:
            raise ValueError("a pool needs prefill and decode (disaggregated), or workers (aggregated)")
        if self.routing_fields is RoutingFields.HEADERS and not disaggregated:
            raise ValueError("routing_fields: headers is for disaggregated pools; leave it out")
        if disaggregated and self.engine is EngineKind.VLLM:
            raise ValueError(
                "vLLM's KV connectors run prefill before decode, and decode needs what prefill answered; Envoy sends "
                "both legs at once. Write workers, for servers that do both"
            )
        return self

    def endpoints(self) -> Iterator[tuple[str, int, EndpointConfig]]:
        """List every endpoint in the file by its place: ``prefill``, ``decode`` or ``workers``, and the index there."""
        for key, sources in self.sources():
            for index, endpoint in enumerate(sources.endpoints):
                yield key, index, endpoint

    def sources(self) -> Iterator[tuple[str, EndpointSources]]:
        """List the roles that the pool has, each by its key ``prefill``, ``decode`` or ``workers``."""
        for key, sources in (("prefill", self.prefill), ("decode", self.decode), ("workers", self.workers)):
            if sources is not None:
                yield key, sources

    def needs_bodies(self) -> Iterator[tuple[Key, str, str]]:
        """Find the settings that need request bodies.

        A pool without such settings can be scheduled by headers alone. The service then cannot remove ranks and rooms
        from a client's body, so the headers have to override all of them.

        Yields:
            The place of each setting, its value, and what to write instead.
        """
        if self.workers is not None:
            yield ("workers",), self.name, "servers that do both take their rank in the body: write another body_mode"
        elif self.routing_fields is not RoutingFields.HEADERS:
            yield ("routing_fields",), self.routing_fields.value, "tell the engines by headers: routing_fields: headers"
        policy = self.policy
        if policy.affinity.prefixes:
            message = "prompts are not seen: write policy: {affinity: {prefixes: false}}"
            yield ("policy", "affinity", "prefixes"), "true", message
        if policy.client_dp_rank is ClientRanks.HONOUR:
            yield ("policy", "client_dp_rank"), "honour", "ranks in bodies are not seen: write client_dp_rank: replace"
        if policy.dp_rank is RankPolicy.NONE:
            message = "headers must name a rank, or one in a client's body would count: write another policy"
            yield ("policy", "dp_rank"), "none", message
        for key, index, endpoint in self.endpoints():
            if key != "workers" and endpoint.dp_rank is not None:
                message = "a listener of one rank takes no rank by headers, and one in a client's body would count"
                yield (key, "endpoints", index, "dp_rank"), str(endpoint.dp_rank), message

    @property
    def name(self) -> str:
        """Name of the pool in logs, metrics and on the admin port: its models."""
        return ",".join(self.models)

    @property
    def is_disaggregated(self) -> bool:
        return self.workers is None
