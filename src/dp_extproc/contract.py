"""Names and value formats that the service, the Envoy configuration and the engines share.

Each attempt comes from the front door as if it were the first, maybe to another process. What has failed travels with
it in :data:`AVOID`: the hosts of an attempt joined by commas, attempts by semicolons.
"""

from typing import Final

DECODE_HOST: Final = "x-dp-decode-host"
"""``IP:port`` of the server that answers the client; an aggregated worker, too."""
PREFILL_HOST: Final = "x-dp-prefill-host"
"""``IP:port`` of the server that gets the mirrored request; absent in aggregated pools."""
PREFILL_PREFIX: Final = "x-dp-prefill-prefix"
"""The first bytes of the prefill leg's body, up to where both legs' bodies are the same."""
PREFIX_LENGTH: Final = "x-dp-prefix-length"
"""How many bytes of the decode leg's body the prefill prefix replaces."""
PREFILL_RID: Final = "x-dp-prefill-rid"
"""Where headers carry the routing fields: the prefill leg's request id. The bodies of both legs are the same then."""
PREFILL_RANK: Final = "x-dp-prefill-rank"
"""Likewise the rank that the prefill leg is to run on; absent where the room alone leads to it."""
OVERRIDE_PREFIX: Final = "x-override-"
"""SGLang's headers that beat the body, where it is told to read them."""
OVERRIDE_RID: Final = "x-override-rid"
OVERRIDE_RANK: Final = "x-override-routed-dp-rank"
OWNER: Final = "x-dp-owner"
"""``IP:port`` of the service process that placed the request and keeps its books."""
LEG: Final = "x-dp-leg"
"""Token of one attempt, by which the prefill leg's own ext_proc stream finds the decision."""
WATCH: Final = "x-dp-watch"
"""Present where the first event of the answer is to be seen by the service."""
RETRY: Final = "x-dp-retry"
"""On a response: the front door is to place the request anew."""
FAILED: Final = "x-dp-failed"
"""On such a response: the hosts that it was sent to."""
AVOID: Final = "x-dp-avoid"
"""On a request that is placed anew: what :data:`FAILED` said each time."""
SESSION: Final = "x-dp-session"
"""The client's name for the conversation; Envoy copies it from the header that is configured for it."""

OWNED_PREFIX: Final = "x-dp-"
"""Every header under it is ours: removed from what clients send, from what engines get, and from their answers."""

FOREIGN_PREFIXES: Final = (OWNED_PREFIX, OVERRIDE_PREFIX, "x-envoy-")
"""Client-sent headers under these prefixes would steer Envoy or override the body's rank in the engine."""
RANK_HEADER: Final = "x-data-parallel-rank"
"""SGLang and vLLM read the rank from it."""
FOREIGN_NAMES: Final = (RANK_HEADER,)
"""Likewise, by full name: SGLang lets this header win over ``routed_dp_rank`` in the body."""

READ_FROM_REQUESTS: Final = frozenset({
    ":method", ":path", "content-type", "content-encoding", "content-length", SESSION, AVOID,
})  # fmt: skip
"""All that the service reads of a request's headers. Envoy forwards no others to it."""
READ_BEHIND_OTHERS: Final = READ_FROM_REQUESTS - {SESSION, AVOID}
"""Likewise where a gateway of others sends the requests: nothing there is set by us, so a client may have set it."""
READ_FROM_RESPONSES: Final = frozenset({":status", "content-type"})
"""Likewise of a response's."""

DESTINATION: Final = "x-gateway-destination-endpoint"
"""Endpoint-picker protocol: the picked ``IP:port``, as a header and in the metadata of :data:`LB_NAMESPACE`."""
DESTINATION_SUBSET: Final = "x-gateway-destination-endpoint-subset"
"""Among which endpoints to pick, in the request's metadata of :data:`SUBSET_NAMESPACE`."""
DESTINATION_SERVED: Final = "x-gateway-destination-endpoint-served"
"""Which endpoint has answered, in the response's metadata of :data:`LB_NAMESPACE`."""
LB_NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"

METADATA_NAMESPACE: Final = "dp_extproc"
"""Dynamic metadata of a request, for access logs."""

META_MODEL: Final = "model"
META_POOL: Final = "pool"
META_PREFILL_HOST: Final = "prefill_host"
META_PREFILL_RANK: Final = "prefill_rank"
META_DECODE_HOST: Final = "decode_host"
META_DECODE_RANK: Final = "decode_rank"
STAGE: Final = "x-dp-stage"
"""Initial metadata of the streams that belong to an attempt: which of them this is."""
FIRST_EVENT: Final = "first-event"

SET_INSIDE: Final = (
    DECODE_HOST, PREFILL_HOST, PREFILL_PREFIX, PREFIX_LENGTH, PREFILL_RID, PREFILL_RANK, OWNER, LEG, WATCH, RETRY,
    FAILED, AVOID, STAGE,
)  # fmt: skip
"""All of ours that nobody may set before a request is placed: every one but :data:`SESSION`, the front door's."""

META_REASON: Final = "reason"
"""Set on refusals only; tells Envoy that the local reply has the service's own body."""
REASON_HEADER: Final = "x-dp-extproc-reason"
"""On a refusal: its reason, for people and tests; the same text as in the body."""

CUT: Final = "cut"
"""Third item of an attempt that Envoy has repeated by itself, as the answering server was lost behind its head."""
_MOST_READ: Final = 16
"""Attempts; more than may be configured."""


def read_failed(header: str | None) -> tuple[frozenset[str], ...]:
    """Read which hosts each earlier attempt was sent to."""
    if not header:
        return ()
    return tuple(frozenset(attempt.split(",")) - {CUT} for attempt in header.split(";", _MOST_READ)[:_MOST_READ])


def read_cut(header: str | None) -> str | None:
    """Read which server the last attempt has lost, if nobody has counted that yet: Envoy asks nobody about it."""
    hosts = (header or "").rpartition(";")[2].split(",")
    return hosts[1] if len(hosts) > 2 and hosts[2] == CUT else None


def write_failed(*hosts: str) -> bytes:
    """Write which hosts an attempt was sent to."""
    return ",".join(hosts).encode()
