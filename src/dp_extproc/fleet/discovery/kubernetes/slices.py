"""Translates an EndpointSlice to members. Pure.

1. ``ready`` left out stands for ready, ``terminating`` left out for not terminating (``discovery.k8s.io/v1``).
2. ``terminating`` counts before ``ready``: with ``publishNotReadyAddresses`` pods are reported as ready until they end.
3. An endpoint that is serving and terminating is draining: it gets no new requests, and its requests go on.
"""

from typing import Final

import msgspec

from dp_extproc.config.discovery import MemberState
from dp_extproc.fleet.discovery.kubernetes.labels import SERVICE_NAME
from dp_extproc.fleet.discovery.kubernetes.members import read_shared
from dp_extproc.fleet.discovery.kubernetes.objects import Conditions, EndpointSlice, TargetRef
from dp_extproc.fleet.discovery.kubernetes.parts import Part

_DECODER: Final = msgspec.json.Decoder(EndpointSlice)
_FAMILIES: Final = {"IPv4", "IPv6"}


def read_slice(text: bytes | msgspec.Raw, port: int | str | None, group_label: str | None) -> Part:
    """Read one slice.

    Args:
        text: JSON of the slice.
        port: Number or name of the port, as configured.
        group_label: Label or annotation with the revision group, as configured.

    Raises:
        msgspec.MsgspecError: It is no slice.
    """
    found = _DECODER.decode(text)
    meta = found.metadata
    service = (meta.labels or {}).get(SERVICE_NAME, "") or meta.name
    if not found.endpoints:
        return Part(service=service, family=found.address_type)  # a placeholder; it has no ports either
    where = f"Service {service}"
    if found.address_type not in _FAMILIES:
        problem = f"{where}: slices of {found.address_type or 'no'} addresses are not read; Envoy needs IP addresses"
        return Part(problem=problem, service=service)
    ports = ((each.name, each.port, each.protocol) for each in found.ports or ())
    members = []
    try:
        shared = read_shared(meta, ports, port, group_label)
        for each in found.endpoints:
            if each.addresses:
                address, pod = each.addresses[0], each.target_ref or TargetRef()
                uid = pod.uid or f"{meta.namespace}/{meta.name}/{address}:{shared.port}"
                state = _state(each.conditions or Conditions())
                members.append(shared.member(address, state=state, uid=uid, name=pod.name))
    except ValueError as error:
        return Part(problem=f"{where}: {error}", service=service)
    return Part(tuple(members), service=service, family=found.address_type)


def _state(conditions: Conditions) -> MemberState:
    if conditions.terminating:
        return MemberState.TERMINATING
    return MemberState.NOT_READY if conditions.ready is False else MemberState.READY
