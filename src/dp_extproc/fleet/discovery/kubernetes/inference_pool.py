"""Translates an InferencePool to the pods and ports that are its endpoints, and a pod to these endpoints. Pure.

Every port of every pod is an endpoint of its own, as in the Gateway API Inference Extension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from dp_extproc.fleet.discovery.kubernetes.objects import InferencePool
from dp_extproc.fleet.discovery.kubernetes.parts import Part
from dp_extproc.fleet.discovery.kubernetes.pods import read_pod

GROUP: Final = "inference.networking.k8s.io"
VERSION: Final = "v1"
PLURAL: Final = "inferencepools"

_DECODER: Final = msgspec.json.Decoder(InferencePool)


@dataclass(frozen=True, slots=True)
class Targets:
    """What an InferencePool selects."""

    selector: str = ""
    """Label selector of its pods."""
    ports: tuple[int, ...] = ()
    problem: str = ""
    """Why it selects nothing, and what to do; empty if it does."""

    @property
    def size(self) -> int:
        """Objects and members that were read."""
        return 1


def read_pool(text: bytes | msgspec.Raw) -> Targets:
    """Read one InferencePool.

    Raises:
        msgspec.MsgspecError: It is none.
    """
    pool = _DECODER.decode(text)
    name, labels = pool.metadata.name, pool.spec.selector.match_labels or {}
    ports = tuple(dict.fromkeys(each.number for each in pool.spec.target_ports or ()))
    if not labels:
        return Targets(problem=f"InferencePool {name} selects no labels; write spec.selector.matchLabels")
    if not ports or not all(1 <= port <= 65535 for port in ports):
        return Targets(problem=f"InferencePool {name} has no valid ports; write spec.targetPorts")
    return Targets(",".join(f"{key}={labels[key]}" for key in sorted(labels)), ports)


def read_pool_pod(
    text: bytes | msgspec.Raw, ports: Sequence[int], group_label: str | None, *, ranks_by_port: bool
) -> Part:
    """Read one pod of an InferencePool.

    Args:
        text: JSON of the pod.
        ports: The ports of each pod.
        group_label: Label or annotation with the revision group, as configured.
        ranks_by_port: Whether the first port is that of DP rank 0, the second that of rank 1, and so on.

    Raises:
        msgspec.MsgspecError: It is no pod.
    """
    parts = [read_pod(text, port, group_label) for port in ports]
    members = tuple(
        replace(member, dp_rank=rank) if ranks_by_port else member
        for rank, part in enumerate(parts)
        for member in part.members
    )
    return Part(members, next((part.problem for part in parts if part.problem), ""))
