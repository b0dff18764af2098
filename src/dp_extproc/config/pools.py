"""Pools: models, endpoints, and the policy by which a pool places requests."""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dp_extproc.config.listen import MAX_PORT
from dp_extproc.config.section import Host, Section
from dp_extproc.config.security import ApiKeySource

_HOST: Final = re.compile(r"[A-Za-z0-9._:%\-]+")


class Engine(StrEnum):
    """What the servers of a pool run."""

    AUTO = "auto"
    """What answers /server_info is SGLang, what answers /version is vLLM."""
    SGLANG = "sglang"
    VLLM = "vllm"


class RoutingFields(StrEnum):
    """What tells the engines of a disaggregated pool where a request runs."""

    BODY = "body"
    HEADERS = "headers"
    """``x-override-*``, on requests that headers can carry; others by the body."""


class HostPolicy(StrEnum):
    """How the host of a leg is picked."""

    LOCKSTEP = "lockstep"
    """Where the request lengthens a step the least for all who share it."""
    LEAST_TOKENS = "least_tokens"
    """The host that has the rank with the fewest tokens."""
    LEAST_REQUESTS = "least_requests"
    """The fewest requests in flight for each of its ranks."""
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    POWER_OF_TWO = "power_of_two"
    """The one with fewer tokens of two drawn at random."""


class RankPolicy(StrEnum):
    """How the DP rank on the picked host is picked."""

    MINIMUM_TOKENS = "minimum_tokens"
    """The one with the fewest tokens."""
    TOKEN_ROUND_ROBIN = "token_round_robin"  # noqa: S105 - no password
    """The one that has been sent the fewest tokens ever."""
    NONE = "none"
    """The engine picks."""


class ClientRanks(StrEnum):
    """What happens to DP ranks that a client sent in its body."""

    REPLACE = "replace"
    HONOUR = "honour"


class AffinitySettings(Section):
    """How requests find the ranks that hold the KV cache of their prompts' beginnings."""

    prefixes: bool = True
    """Whether prompts are compared with those that were sent before."""
    sessions: bool = True
    """Whether requests of one conversation, as ``envoy.session_header`` names it, are."""


class PolicySettings(Section):
    """How a pool places requests."""

    host: HostPolicy = Field(default=HostPolicy.LOCKSTEP, strict=False)
    dp_rank: RankPolicy = Field(default=RankPolicy.MINIMUM_TOKENS, strict=False)
    client_dp_rank: ClientRanks = Field(default=ClientRanks.REPLACE, strict=False)
    affinity: AffinitySettings = AffinitySettings()


class EndpointConfig(Section):
    """One engine server. In the file a URL, or a mapping with ``url`` and what must not be discovered."""

    url: str
    bootstrap_port: Annotated[int, Field(ge=1, le=MAX_PORT)] | None = None
    bootstrap_host: Host | None = None
    dp_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    dp_rank: Annotated[int, Field(ge=0, lt=4096)] | None = None
    """Of an engine that gives each rank a listener of its own: which rank answers at this URL."""

    @model_validator(mode="after")
    def _rank_is_one_of_its_server(self) -> Self:
        if self.dp_rank is not None and self.dp_size is not None and self.dp_rank >= self.dp_size:
            raise ValueError(f"dp_rank {self.dp_rank} is not one of the {self.dp_size} ranks (they count from 0)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _is_plain_http(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        if parts.scheme != "http" or not host or parts.path.strip("/") or parts.query or parts.fragment or "@" in value:
            raise ValueError("write the engine's address as http://host:port, without a path")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host!r} is not a host name or an IP address")
        if not port:
            raise ValueError("name the engine's port: http://host:port")
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80


class Endpoints(Section):
    endpoints: Annotated[tuple[EndpointConfig, ...], Field(min_length=1, strict=False)]


class PoolConfig(Section):
    """The servers of one or more models: ``prefill`` and ``decode``, or ``workers`` alone."""

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
    prefill: Endpoints | None = None
    decode: Endpoints | None = None
    workers: Endpoints | None = None
    engine: Engine = Field(default=Engine.AUTO, strict=False)
    routing_fields: RoutingFields = Field(default=RoutingFields.BODY, strict=False)
    policy: PolicySettings = PolicySettings()
    api_key: ApiKeySource | None = None
    """What the pool's engines were started with (``--api-key``); None for none."""

    @model_validator(mode="after")
    def _has_one_shape(self) -> Self:
        disaggregated = self.prefill is not None and self.decode is not None
        if self.workers is not None and (self.prefill is not None or self.decode is not None):
            raise ValueError("a pool has either prefill and decode, or workers; split this one in two pools")
        if self.workers is None and not disaggregated:
            raise ValueError("a pool needs prefill and decode (disaggregated), or workers (aggregated)")
        if self.routing_fields is RoutingFields.HEADERS and not disaggregated:
            raise ValueError("routing_fields: headers is for disaggregated pools; leave it out")
        if disaggregated and self.engine is Engine.VLLM:
            raise ValueError(
                "vLLM's KV connectors run prefill before decode, and decode needs what prefill answered; Envoy sends "
                "both legs at once. Write workers, for servers that do both"
            )
        return self

    def needs_bodies(self) -> Iterator[tuple[tuple[int | str, ...], str, str]]:
        """Tell what of the pool only request bodies can do: where it stands, its value, and what to write instead.

        A pool of which nothing is told can be served by the headers of requests alone. Then nothing takes back what a
        client's body says of ranks and rooms, so headers have to say all of it.
        """
        if self.workers is not None:
            yield ("workers",), self.name, "servers that do both take their rank in the body: write another body_mode"
        elif self.routing_fields is not RoutingFields.HEADERS:
            yield ("routing_fields",), self.routing_fields.value, "tell the engines by headers: routing_fields: headers"
        policy = self.policy
        if policy.affinity.prefixes:
            yield (
                ("policy", "affinity", "prefixes"),
                "true",
                "prompts are not seen: write policy: {affinity: {prefixes: false}}",
            )
        if policy.client_dp_rank is ClientRanks.HONOUR:
            yield ("policy", "client_dp_rank"), "honour", "ranks in bodies are not seen: write client_dp_rank: replace"
        if policy.dp_rank is RankPolicy.NONE:
            message = "headers must name a rank, or one in a client's body would count: write another policy"
            yield ("policy", "dp_rank"), "none", message
        for role, section in (("prefill", self.prefill), ("decode", self.decode)):
            for index, endpoint in enumerate(section.endpoints if section else ()):
                if endpoint.dp_rank is not None:
                    message = "a listener of one rank takes no rank by headers, and one in a client's body would count"
                    yield (role, "endpoints", index, "dp_rank"), str(endpoint.dp_rank), message

    @property
    def name(self) -> str:
        """What logs, metrics and the admin port call the pool: its models."""
        return ",".join(self.models)

    @property
    def is_disaggregated(self) -> bool:
        return self.workers is None
