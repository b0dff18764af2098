"""Translates a pod to a member. Pure.

1. Workers of a LeaderWorkerSet are left out, because only its leader serves HTTP.
2. A pod that has ended, or that has no address yet, is no member.
3. A pod with a deletion time is terminating. Otherwise its condition ``Ready`` counts, while it is running.
"""

from typing import Final

import msgspec

from dp_extproc.config.discovery import MemberState
from dp_extproc.fleet.discovery.kubernetes.labels import serves_http
from dp_extproc.fleet.discovery.kubernetes.members import read_shared
from dp_extproc.fleet.discovery.kubernetes.objects import Pod
from dp_extproc.fleet.discovery.kubernetes.parts import Part

_DECODER: Final = msgspec.json.Decoder(Pod)
_ENDED: Final = {"Succeeded", "Failed"}


def read_pod(text: bytes | msgspec.Raw, port: int | str | None, group_label: str | None) -> Part:
    """Read one pod; the arguments are those of :func:`dp_extproc.fleet.discovery.kubernetes.slices.read_slice`.

    Raises:
        msgspec.MsgspecError: It is no pod.
    """
    pod = _DECODER.decode(text)
    meta = pod.metadata
    if not serves_http(meta) or pod.status.phase in _ENDED or not pod.status.pod_ip:
        return Part()
    ports = (
        (each.name, each.container_port, each.protocol)
        for container in pod.spec.containers or ()
        for each in container.ports or ()
    )
    try:
        shared = read_shared(meta, ports, port, group_label)
        member = shared.member(pod.status.pod_ip, state=_state(pod), uid=meta.uid, name=meta.name)
    except ValueError as error:
        return Part(problem=f"pod {meta.name}: {error}")
    return Part((member,))


def _state(pod: Pod) -> MemberState:
    if pod.metadata.deletion_timestamp is not None:
        return MemberState.TERMINATING
    ready = any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or ())
    return MemberState.READY if ready and pod.status.phase == "Running" else MemberState.NOT_READY
