"""Where the endpoints of a role come from, other than from a list in the file: DNS, another file, Kubernetes."""

import ipaddress
import re
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from dp_extproc.config.listen import MAX_PORT, SocketAddress
from dp_extproc.config.section import JsonSchema, Seconds, Section, is_given

_DNS_LABEL: Final = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,254}}$){_DNS_LABEL}(?:\.{_DNS_LABEL})*\.?")
_SRV: Final = re.compile(r"_[A-Za-z0-9-]+\._tcp\..+")


def _dns_name(value: str) -> str:
    """Accept an address too: then nothing is looked up, and a variable may hold either."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(value.removeprefix("[").removesuffix("]")))
    if not _DNS_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a DNS name, such as decode.llm.svc.cluster.local; the port is a key")
    return value


Port = Annotated[int, Field(ge=1, le=MAX_PORT)]
Group = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[\x21-\x7e]+$")]
"""Name of a revision group, such as the value of a label."""
_Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=253)]
"""Name of a Kubernetes object."""
_PortName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
_Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9./_-]*[A-Za-z0-9])?$", max_length=317)]
"""Key of a label or an annotation, such as ``sglang.ai/transfer-group``."""
_Text = Annotated[str, Field(min_length=1)]


class MemberState(StrEnum):
    """Whether a member may get requests, as its source reports it."""

    READY = "ready"
    NOT_READY = "not_ready"
    """It gets none now, and may be ready later."""
    TERMINATING = "terminating"
    """It gets none any more. Its requests go on."""


class DnsRecords(StrEnum):
    """Which records of a name are looked up."""

    ADDRESS = "address"
    """Its IPv4 addresses, or its IPv6 addresses if it has no others; the port is configured."""
    SRV = "srv"
    """Its SRV records, which have ports."""


class DnsSettings(Section):
    """All endpoints behind one name: of a headless Service, or of a service of docker compose."""

    name: Annotated[str, AfterValidator(_dns_name)] = Field(examples=["decode.llm.svc.cluster.local"])
    """The name. With ``type: srv`` it begins with ``_PORT-NAME._tcp.``"""
    type: DnsRecords = Field(default=DnsRecords.ADDRESS, strict=False)
    port: Port | None = Field(default=None, examples=[30000])
    """Port of every engine. SRV records have their own."""
    interval: Seconds | None = Field(default=None, examples=["5s"])
    """Seconds between two look-ups. None stands for the TTL of the answer if it is known, else for 5 seconds."""
    nameserver: SocketAddress | None = Field(default=None, examples=["10.96.0.10:53"])
    """The DNS server. None stands for those of the system, in ``/etc/resolv.conf``."""
    keep_for: Seconds = 30.0
    """Seconds for which the last endpoints are kept while the name has none."""
    group: Group | None = Field(default=None, examples=["v2"])
    """Revision group of the endpoints."""

    @model_validator(mode="after")
    def _has_one_port(self) -> Self:
        if self.type is DnsRecords.SRV:
            if self.port is not None:
                raise ValueError("SRV records have ports; leave port out")
            if not _SRV.fullmatch(self.name):
                raise ValueError("a name with SRV records begins with _port-name._tcp, as in _http._tcp.decode.llm.svc")
        elif _SRV.fullmatch(self.name):
            raise ValueError("a name that begins with _port-name._tcp has SRV records; write type: srv, without port")
        elif self.port is None:
            raise ValueError("name the port of the engines: port: 30000")
        return self


class FileSettings(Section):
    """Endpoints in a file of their own, which another program may replace at any time."""

    path: _Text = Field(examples=["/etc/dp-extproc/engines.yaml"])
    """Path of the file."""
    keep_for: Seconds = 30.0
    """Seconds for which the last endpoints are kept while the file lists none."""


class KubernetesSettings(Section):
    """Endpoints in Kubernetes: those of a Service, pods, or those of an InferencePool.

    Exactly one of ``service``, ``selector``, ``pods`` and ``inference_pool`` is given.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                is_given("service"),
                is_given("selector"),
                is_given("pods"),
                {**is_given("inference_pool"), "not": is_given("port")},
            ],
            "anyOf": [is_given("inference_pool"), {"properties": {"ranks_by_port": {"not": {"const": True}}}}],
        }
    )

    service: _Name | None = Field(default=None, examples=["qwen3-prefill"])
    """Name of a Service."""
    selector: _Text | None = Field(default=None, examples=["app=qwen3,role=prefill"])
    """Label selector of Services. Their labels are copied to their EndpointSlices, which are read."""
    pods: _Text | None = Field(default=None, examples=["app=qwen3,role=prefill"])
    """Label selector of pods, where annotations or labels of pods count."""
    inference_pool: _Name | None = Field(default=None, examples=["qwen3"])
    """Name of an InferencePool. Its pods are read, and each of its ports is an endpoint of its own."""
    ranks_by_port: bool = False
    """Whether the ports of an InferencePool are those of DP ranks: the first that of rank 0, and so on."""
    namespace: _Name | None = Field(default=None, examples=["llm"])
    """Namespace of the objects. None stands for that of the service account or of the kubeconfig."""
    port: Port | _PortName | None = Field(default=None, examples=["http"])
    """Number or name of the port. None stands for the port named ``http``, or else for the only one."""
    group_label: _Label | None = Field(default=None, examples=["sglang.ai/transfer-group"])
    """Label or annotation with the revision group. None stands for the labels of known controllers."""
    keep_for: Seconds = 30.0
    """Seconds for which the last endpoints are kept while no endpoint is ready, except those that terminate."""

    @model_validator(mode="after")
    def _selects_in_one_way(self) -> Self:
        if [self.service, self.selector, self.pods, self.inference_pool].count(None) != 3:
            raise ValueError(
                "write one of service: NAME, selector: LABELS (of Services), pods: LABELS and inference_pool: NAME"
            )
        if self.inference_pool is not None and self.port is not None:
            raise ValueError("an InferencePool has ports; leave port out")
        if self.ranks_by_port and self.inference_pool is None:
            raise ValueError("ranks_by_port is for the ports of an inference_pool; leave it out")
        return self


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, dict) else value


class _OneOrMoreSchema:
    """JSON Schema of a key that takes one mapping, or a list of them."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        items = handler(schema)["items"]
        return {"anyOf": [items, {"type": "array", "items": items, "minItems": 1}]}


OneOrMore = (BeforeValidator(_listed), Field(min_length=1, strict=False), _OneOrMoreSchema())
"""Annotations of a key that takes one mapping, or a list of them."""
