"""The configuration file as frozen, typed data.

Every default is in this package and nowhere else. Values that an endpoint leaves out (ranks, bootstrap port, version)
are discovered from the engine. A wrong value is refused with a remedy. The loader reports all refusals at once.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.config.envoy import BodyMode, EnvoySettings
from dp_extproc.config.listen import ListenSettings
from dp_extproc.config.load import LoadSettings, LoadSignal
from dp_extproc.config.picker import PickerSettings, PrefillLeg
from dp_extproc.config.pools import HostPolicy, PoolConfig, RoutingFields, why_not
from dp_extproc.config.problems import Key, spell
from dp_extproc.config.reliability import (
    AdmissionSettings,
    OutlierDetectionSettings,
    QueueSettings,
    RetrySettings,
    SupervisionSettings,
)
from dp_extproc.config.section import Seconds, Section
from dp_extproc.config.security import EngineTls
from dp_extproc.config.sync import SyncSettings


class Protocol(StrEnum):
    """Which client the service has."""

    ENVOY = "envoy"
    """The Envoy that ``dp-extproc envoy-config`` configures."""
    ENDPOINT_PICKER = "endpoint_picker"
    """Any gateway that speaks the endpoint-picker protocol of the Gateway API Inference Extension."""


class Reload(StrEnum):
    """When the file is read again."""

    SIGNAL = "signal"
    """On SIGHUP."""
    WATCH = "watch"
    """On SIGHUP, and when the file changes."""


_Named = tuple[Key, str, str]
"""The path of a name in the file, the name, and the place that messages show."""


class Config(Section):
    """The whole file. Only ``pools`` is required."""

    listen: ListenSettings = ListenSettings()
    envoy: EnvoySettings = EnvoySettings()
    protocol: Protocol = Field(default=Protocol.ENVOY, strict=False)
    prefill_leg: PrefillLeg | None = Field(default=None, strict=False, examples=["service"])
    """Who sends prefill legs; None stands for ``envoy`` with ``protocol: envoy``, and for ``service`` otherwise."""
    picker: PickerSettings = PickerSettings()
    load: LoadSettings = LoadSettings()
    drain: Seconds = 10.0
    """Seconds for which a stopping service continues to work after it has reported that it is not ready."""
    reload: Reload = Field(default=Reload.SIGNAL, strict=False)
    sync: SyncSettings | None = None
    """The bus between replicas; None if there are no others. No message shows its URL, which may have a password."""
    supervision: SupervisionSettings = SupervisionSettings()
    retry: RetrySettings = RetrySettings()
    outlier_detection: OutlierDetectionSettings = OutlierDetectionSettings()
    admission: AdmissionSettings = AdmissionSettings()
    engine_tls: EngineTls | None = None
    """TLS to engines; None for engines that speak plain HTTP."""
    queue: QueueSettings | None = None
    """The queue of requests that would be refused with 429; None refuses them at once."""
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    pools: Annotated[tuple[PoolConfig, ...], Field(min_length=1, strict=False)]
    """The pools. Each serves one or more models."""

    @model_validator(mode="after")
    def _lockstep_has_its_estimate(self) -> Self:
        if self.load.signal is LoadSignal.SCRAPED:
            message = (
                "host: lockstep needs load.signal: estimate; with load.signal: scraped write another host policy, such "
                "as random or round_robin"
            )
            found = [index for index, pool in enumerate(self.pools) if pool.policy.host is HostPolicy.LOCKSTEP]
            _refuse(_objection(("pools", index, "policy", "host"), "lockstep", message) for index in found)
        return self

    @property
    def sends_legs(self) -> bool:
        """Whether the service sends prefill legs itself."""
        default = PrefillLeg.SERVICE if self.protocol is Protocol.ENDPOINT_PICKER else PrefillLeg.ENVOY
        return (self.prefill_leg or default) is PrefillLeg.SERVICE

    @model_validator(mode="after")
    def _leg_has_its_sender(self) -> Self:
        is_picker, found = self.protocol is Protocol.ENDPOINT_PICKER, []
        disaggregated = [index for index, pool in enumerate(self.pools) if pool.is_disaggregated]
        if is_picker and disaggregated and not self.sends_legs:
            message = (
                "a gateway sends a request to one endpoint, so with protocol: endpoint_picker the service sends the "
                "prefill leg; write service, or leave prefill_leg out"
            )
            found.append(_objection(("prefill_leg",), "envoy", message))
        if is_picker and self.retry.attempts > 1 and "attempts" in self.retry.model_fields_set:
            message = (
                "with protocol: endpoint_picker the gateway does not ask for another endpoint, so a request has one "
                "attempt; leave attempts out, and let clients repeat the request"
            )
            found.append(_objection(("retry", "attempts"), str(self.retry.attempts), message))
        if self.sends_legs and disaggregated:
            if self.envoy.body_mode is BodyMode.NONE:
                message = (
                    "with prefill_leg: service the prefill leg is made of the body, which has to pass through the "
                    "service; write buffered, or prefill_leg: envoy"
                )
                found.append(_objection(("envoy", "body_mode"), "none", message))
            message = "with prefill_leg: service the routing fields stand in the bodies of both legs; write body"
            found += [
                _objection(("pools", index, "routing_fields"), "headers", message)
                for index in disaggregated
                if self.pools[index].routing_fields is RoutingFields.HEADERS
            ]
        _refuse(found)
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
            _refuse(needs)
        return self

    @model_validator(mode="after")
    def _envoy_uses_tls_too(self) -> Self:
        tls = self.listen.tls
        if self.protocol is Protocol.ENDPOINT_PICKER or tls is None:
            return self
        if tls.self_signed:
            raise ValueError(
                "listen.tls.self_signed is for protocol: endpoint_picker, because the printed Envoy configuration "
                "verifies the service; write cert and key"
            )
        if self.envoy.service_tls is None:
            raise ValueError(
                "listen.tls needs envoy.service_tls: {ca: FILE, name: DNS-NAME}, or the printed Envoy configuration "
                "would speak without TLS to a service that demands it"
            )
        return self

    @model_validator(mode="after")
    def _engines_have_one_scheme(self) -> Self:
        wrong = [
            (loc, url, message)
            for loc, url, _ in self._urls()
            if (message := why_not(url, has_tls=self.engine_tls is not None)) is not None
        ]
        _refuse(_objection(loc, url, message) for loc, url, message in wrong)
        if self.envoy.engine_tls is not None and self.engine_tls is None:
            raise ValueError("envoy.engine_tls has the files of engine_tls on Envoy's machine; write engine_tls too")
        sds = None if self.envoy.engine_tls is None else self.envoy.engine_tls.sds
        if sds is not None and sds.certificate is None and self.engine_tls is not None and self.engine_tls.cert:
            raise ValueError(
                "engine_tls.cert is for engines that require a certificate, which Envoy would not have; "
                "name its secret in envoy.engine_tls.sds.certificate, such as default"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        _refuse([*_repeated(self._models(), "keep it in one"), *_repeated(self._urls(), "a server has one role")])
        return self

    def _models(self) -> Iterator[_Named]:
        for index, pool in enumerate(self.pools):
            for position, model in enumerate(pool.models):
                yield ("pools", index, "models", position), f"model {model!r}", f"pools[{index}]"

    def _urls(self) -> Iterator[_Named]:
        for index, pool in enumerate(self.pools):
            for key, position, endpoint in pool.endpoints():
                loc = ("pools", index, key, "endpoints", position)
                yield loc, endpoint.url, spell(loc)


def _repeated(named: Iterator[_Named], remedy: str) -> Iterator[InitErrorDetails]:
    """Refuse every name that occurred before, at its own place."""
    first: dict[str, str] = {}
    for loc, name, place in named:
        if name in first:
            yield _objection(loc, name, f"{name} is in {first[name]} and in {place}; {remedy}")
        first.setdefault(name, place)


def _refuse(objections: Iterable[InitErrorDetails]) -> None:
    """Raise all objections, if there are any. Pydantic merges them into its own report."""
    if found := list(objections):
        raise ValidationError.from_exception_data("Config", found)


def _objection(loc: Key, value: str, message: str) -> InitErrorDetails:
    error = PydanticCustomError("value_error", "{error}", {"error": message})
    return InitErrorDetails(type=error, loc=loc, input=value)
