"""Labels and annotations that have a meaning for discovery. Pure.

1. A label counts before an annotation of the same name.
2. Without ``group_label`` the first of GROUP_LABELS that an object has is its revision group.
3. ``leaderworkerset.sigs.k8s.io/template-revision-hash`` is none of them: it is the hash of one LeaderWorkerSet.
   Prefill and decode are two, so their hashes always differ, and no pair would be left.
"""

import re
from typing import Final

from dp_extproc.fleet.discovery.kubernetes.objects import Meta

SERVICE_NAME: Final = "kubernetes.io/service-name"
"""Label of a slice with the name of its Service."""
GROUP_LABELS: Final = (
    "sglang.ai/transfer-group",  # SGLang's own router
    "disaggregatedset.x-k8s.io/revision",  # DisaggregatedSet of the LeaderWorkerSet project; llm-d reads it too
    "smg.ai/pairing-protocol",  # an annotation that smg compares as a whole
)
WORKER_INDEX: Final = "leaderworkerset.sigs.k8s.io/worker-index"
"""Label of every pod of a LeaderWorkerSet. The pod with index 0 is the leader, and only the leader serves HTTP."""
BOOTSTRAP_PORT: Final = "sglang.ai/bootstrap-port"
"""Annotation with the bootstrap port of a prefill engine; smg's default has this name."""
BOOTSTRAP: Final = "bootstrap"
"""Name of a port that is the bootstrap port of a prefill engine."""
_GROUP: Final = re.compile(r"[\x21-\x7e]{1,253}")


def group_of(meta: Meta, label: str | None) -> str | None:
    """Return the revision group of an object; None if it has none.

    Raises:
        ValueError: The value is no name of a group.
    """
    for key in GROUP_LABELS if label is None else (label,):
        if value := _mark(meta, key):
            if not _GROUP.fullmatch(value):
                raise ValueError(f"{key} is no name of a group; write up to 253 visible ASCII characters")
            return value
    return None


def bootstrap_port_of(meta: Meta, ports: dict[str, int]) -> int | None:
    """Return the bootstrap port: that of the annotation, or else the port named ``bootstrap``; None if there is none.

    Raises:
        ValueError: The annotation is no port.
    """
    value = _mark(meta, BOOTSTRAP_PORT)
    if not value:
        return ports.get(BOOTSTRAP)
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:6]) <= 65535):
        raise ValueError(f"{BOOTSTRAP_PORT} is {value[:40]!r}, which is no port; write a number from 1 to 65535")
    return int(value)


def serves_http(meta: Meta) -> bool:
    """Check that a pod is no worker of a LeaderWorkerSet."""
    return (meta.labels or {}).get(WORKER_INDEX, "0") == "0"


def _mark(meta: Meta, key: str) -> str:
    return (meta.labels or {}).get(key) or (meta.annotations or {}).get(key) or ""
