"""The configuration file as frozen, typed data.

Every default stands here and nowhere else. What is left out of an endpoint (ranks, bootstrap port, version) is
discovered from the engine. A value that cannot be right is refused with what to write instead; the loader
collects all refusals of a file before it reports them.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from dp_extproc.config.envoy import BodyMode, EnvoySettings
from dp_extproc.config.listen import MAX_PORT, ListenSettings
from dp_extproc.config.reliability import (
    AdmissionSettings,
    HealthSettings,
    QueueSettings,
    RetrySettings,
    SupervisionSettings,
)
from dp_extproc.config.section import Bytes, Host, Seconds, Section
from dp_extproc.config.security import ApiKeySource
from dp_extproc.config.sync import SyncSettings

_HOST: Final = re.compile(r"[A-Za-z0-9._:%\-]+")


class Engine(StrEnum):
    """What the servers of a pool run."""

    AUTO = "auto"
    """What answers /server_info is SGLang, what answers /version is vLLM."""
    SGLANG = "sglang"
    VLLM = "vllm"


class Carrier(StrEnum):
    """What tells the engines of a disaggregated pool where a request runs."""

    BODY = "body"
    HEADERS = "headers"
    """``x-override-*``, on requests that headers can carry; others by the body."""


class LoadSource(StrEnum):
    """Which page of an engine tells its load."""

    AUTO = "auto"
    LOADS = "loads"
    METRICS = "metrics"


class LoadSignal(StrEnum):
    """What the tokens of a rank are, for policies that compare tokens."""

    ESTIMATE = "estimate"
    """What was sent and has not been worked off, by our own books, and what the engines show beyond it."""
    SCRAPED = "scraped"
    """The engine's gauge of used tokens, plus what was sent since it was read."""


class LoadSettings(Section):
    """How the engines' load is read, and what is made of it."""

    signal: LoadSignal = Field(default=LoadSignal.ESTIMATE, strict=False)
    source: LoadSource = Field(default=LoadSource.AUTO, strict=False)
    interval: Seconds = 1.0
    stale_after: Seconds = 5.0
    timeout: Seconds = 1.0
    """Hard limit of one scrape, from connecting to the last byte."""
    max_page_bytes: Bytes = 8 << 20
    """A load page larger than this is refused. Real pages with many ranks are below 1 MiB."""
    prefill_step_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 500.0
    """The fixed time of a prefill step, in tokens: 10 ms at 20 us per token. A wrong value costs little."""
    decode_request_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 1000.0
    """The fixed time of a sequence in a decode step, in tokens of context: 50 us at 50 ns per token."""

    @model_validator(mode="after")
    def _stale_is_later_than_the_next_scrape(self) -> Self:
        if self.stale_after <= self.interval:
            raise ValueError("stale_after must be longer than interval, or every sample is stale before the next one")
        return self


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


_Named = tuple[tuple[int | str, ...], str, str]
"""Where a name stands in the file, the name, and how its place is told."""


class _Endpoints(Section):
    endpoints: Annotated[tuple[EndpointConfig, ...], Field(min_length=1, strict=False)]


class PoolConfig(Section):
    """The servers of one or more models: ``prefill`` and ``decode``, or ``workers`` alone."""

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1, strict=False)]
    prefill: _Endpoints | None = None
    decode: _Endpoints | None = None
    workers: _Endpoints | None = None
    engine: Engine = Field(default=Engine.AUTO, strict=False)
    carrier: Carrier = Field(default=Carrier.BODY, strict=False)
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
        if self.carrier is Carrier.HEADERS and not disaggregated:
            raise ValueError("carrier: headers is for disaggregated pools; leave it out")
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
        elif self.carrier is not Carrier.HEADERS:
            yield ("carrier",), self.carrier.value, "tell the engines by headers: carrier: headers"
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


class Protocol(StrEnum):
    """To whom the service speaks."""

    OWN = "own"
    """The Envoy that ``dp-extproc envoy-config`` configures."""
    ENDPOINT_PICKER = "endpoint_picker"
    """Any gateway that speaks the endpoint-picker protocol of the Gateway API Inference Extension."""


class Reload(StrEnum):
    """When the file is read anew."""

    SIGNAL = "signal"
    """On SIGHUP."""
    WATCH = "watch"
    """Likewise, and when it changes."""


class Config(Section):
    """The whole file."""

    listen: ListenSettings = ListenSettings()
    envoy: EnvoySettings = EnvoySettings()
    protocol: Protocol = Field(default=Protocol.OWN, strict=False)
    load: LoadSettings = LoadSettings()
    drain: Seconds = 10.0
    """How long a stopping service goes on answering after it has reported that it is not ready."""
    reload: Reload = Field(default=Reload.SIGNAL, strict=False)
    sync: SyncSettings | None = None
    """None for a service that is alone."""
    supervision: SupervisionSettings = SupervisionSettings()
    retry: RetrySettings = RetrySettings()
    health: HealthSettings = HealthSettings()
    admission: AdmissionSettings = AdmissionSettings()
    queue: QueueSettings | None = None
    """None refuses at once what cannot be admitted."""
    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _lockstep_has_its_estimate(self) -> Self:
        if self.load.signal is LoadSignal.SCRAPED:
            lacking = [
                _objection(
                    ("pools", index, "policy", "host"),
                    pool.policy.host.value,
                    "host: lockstep needs load.signal: estimate; with load.signal: scraped write another host policy, "
                    "such as random or round_robin",
                )
                for index, pool in enumerate(self.pools)
                if pool.policy.host is HostPolicy.LOCKSTEP
            ]
            if lacking:
                raise ValidationError.from_exception_data("Config", lacking)
        return self

    @model_validator(mode="after")
    def _gateways_do_not_mirror(self) -> Self:
        if self.protocol is Protocol.ENDPOINT_PICKER and any(pool.is_disaggregated for pool in self.pools):
            raise ValueError(
                "protocol: endpoint_picker names one endpoint for a request, so it serves pools of workers only; for "
                "prefill and decode use the Envoy that dp-extproc envoy-config configures"
            )
        return self

    @model_validator(mode="after")
    def _headers_are_enough(self) -> Self:
        if self.envoy.body_mode is BodyMode.NONE:
            needs = [
                _objection(("pools", 0, *loc), value, f"envoy.body_mode: none: {message}")
                for loc, value, message in self.pools[0].needs_bodies()
            ]
            if len(self.pools) > 1:
                message = "the model of a request is not seen, so there can be one pool only; write another body_mode"
                needs.append(_objection(("pools", 1), self.pools[1].name, f"envoy.body_mode: none: {message}"))
            if needs:
                raise ValidationError.from_exception_data("Config", needs)
        return self

    @model_validator(mode="after")
    def _both_sides_speak_tls(self) -> Self:
        if self.listen.tls is not None and self.envoy.service_tls is None:
            raise ValueError(
                "listen.tls needs envoy.service_tls: {ca: FILE, name: DNS-NAME}, or the printed Envoy configuration "
                "would speak without TLS to a service that demands it"
            )
        return self

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> Self:
        conflicts = [*_repeated(self._models(), "keep it in one"), *_repeated(self._urls(), "a server has one role")]
        if conflicts:
            raise ValidationError.from_exception_data("Config", conflicts)  # pydantic merges it into its own report
        return self

    def _models(self) -> Iterator[_Named]:
        for index, pool in enumerate(self.pools):
            for position, model in enumerate(pool.models):
                yield ("pools", index, "models", position), f"model {model!r}", f"pools[{index}]"

    def _urls(self) -> Iterator[_Named]:
        for index, pool in enumerate(self.pools):
            for role in ("prefill", "decode", "workers"):
                section: _Endpoints | None = getattr(pool, role)
                for position, endpoint in enumerate(section.endpoints if section else ()):
                    loc = ("pools", index, role, "endpoints", position)
                    yield loc, endpoint.url, f"pools[{index}].{role}.endpoints[{position}]"


def _repeated(named: Iterator[_Named], remedy: str) -> Iterator[InitErrorDetails]:
    """Object to every name that has stood before, at its own place."""
    first: dict[str, str] = {}
    for loc, name, place in named:
        if name in first:
            yield _objection(loc, name, f"{name} is in {first[name]} and in {place}; {remedy}")
        first.setdefault(name, place)


def _objection(loc: tuple[int | str, ...], value: str, message: str) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{error}", {"error": message})
    return InitErrorDetails(type=error, loc=loc, input=value)
