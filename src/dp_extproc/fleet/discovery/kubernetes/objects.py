"""Objects of the Kubernetes API, with the fields that are used here. Everything else is skipped while decoding. Pure.

The API writes null, or leaves a field out, where a list or a mapping is empty.
"""

from msgspec import Raw, Struct, field


class Meta(Struct, rename="camel"):
    """The ``metadata`` of an object."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Object(Struct):
    """Any object: what identifies it, and the version of its last change."""

    metadata: Meta


class SlicePort(Struct):
    """One port of a slice; it has the name of the port of the Service."""

    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Conditions(Struct):
    """State of one endpoint of a slice. None stands for what the API defines as the default."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(Struct):
    """The pod behind an endpoint of a slice."""

    uid: str = ""
    name: str = ""


class SliceEndpoint(Struct, rename="camel"):
    """One endpoint of a slice. Its addresses are interchangeable, and only the first is used."""

    addresses: list[str] | None = None
    conditions: Conditions | None = None
    target_ref: TargetRef | None = None


class EndpointSlice(Object, rename="camel"):
    """A part of the endpoints of one Service, of one address family."""

    address_type: str = ""
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class ContainerPort(Struct, rename="camel"):
    """A port that a container declares."""

    container_port: int
    name: str | None = None
    protocol: str | None = None


class Container(Struct):
    """A container of a pod."""

    ports: list[ContainerPort] | None = None


class PodSpec(Struct):
    """What a pod is to be."""

    containers: list[Container] | None = None


class PodCondition(Struct):
    """One condition of a pod, such as ``Ready``."""

    type: str
    status: str


class PodStatus(Struct):
    """What a pod is."""

    phase: str = ""
    conditions: list[PodCondition] | None = None
    pod_ip: str = field(name="podIP", default="")
    """The first address of the pod, of the first family of a dual-stack cluster."""


class Pod(Object):
    """A pod."""

    spec: PodSpec = field(default_factory=PodSpec)
    status: PodStatus = field(default_factory=PodStatus)


class LabelSelector(Struct, rename="camel"):
    """A selector of pods by their labels."""

    match_labels: dict[str, str] | None = None


class TargetPort(Struct):
    """A port of each pod of an InferencePool."""

    number: int


class InferencePoolSpec(Struct, rename="camel"):
    """The pods of an InferencePool, and their ports."""

    selector: LabelSelector = field(default_factory=LabelSelector)
    target_ports: list[TargetPort] | None = None


class InferencePool(Object):
    """An InferencePool of the Gateway API Inference Extension."""

    spec: InferencePoolSpec = field(default_factory=InferencePoolSpec)


class PageMeta(Struct, rename="camel"):
    """The ``metadata`` of a page of a list."""

    resource_version: str
    more: str = field(name="continue", default="")
    """Token of the next page; empty on the last."""


class Page(Struct):
    """One page of a list."""

    metadata: PageMeta
    items: list[Raw] | None = None


class Event(Struct):
    """One line of a watch."""

    type: str
    object: Raw


class Cause(Struct):
    """A detail of a failure."""

    reason: str | None = None


class StatusDetails(Struct, rename="camel"):
    """Details of a failure."""

    retry_after_seconds: int | None = None
    causes: list[Cause] | None = None


class Status(Struct):
    """A failure as the API server writes it: as the body of a response, or as the object of an ``ERROR`` event."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: StatusDetails | None = None
