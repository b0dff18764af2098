"""Names and value formats that the service, the Envoy configuration and the engines share.

A repeated request arrives from the front door, Envoy's listener for clients, like a new one, and possibly at another
process of the service. So its header :data:`AVOID` lists what has failed before: attempts, separated by semicolons, and
for each the prefill endpoint (of a disaggregated pool), the decode endpoint and maybe a mark, separated by commas. The
mark is :data:`CUT`, or what :func:`write_lost` and :func:`write_error` write.
"""

from typing import Final, NamedTuple

DECODE_HOST: Final = "x-dp-decode-host"
"""``IP:port`` of the decode endpoint or the aggregated endpoint, whose response the client gets."""
PREFILL_HOST: Final = "x-dp-prefill-host"
"""``IP:port`` of the prefill endpoint, which gets the mirrored request; absent in aggregated pools."""
PREFILL_PREFIX: Final = "x-dp-prefill-prefix"
"""The leg preamble of the prefill leg: its body up to where the bodies of both legs are the same."""
PREFIX_LENGTH: Final = "x-dp-prefix-length"
"""Length in bytes of the decode leg's preamble, which :data:`PREFILL_PREFIX` replaces."""
PREFILL_RID: Final = "x-dp-prefill-rid"
"""Request id of the prefill leg, where routing fields are headers and the bodies of both legs are the same."""
PREFILL_RANK: Final = "x-dp-prefill-rank"
"""DP rank of the prefill leg, where routing fields are headers; absent if the bootstrap room alone selects it."""
OVERRIDE_PREFIX: Final = "x-override-"
"""SGLang's headers that take precedence over the body, if the engine is configured to read them."""
OVERRIDE_RID: Final = "x-override-rid"
OVERRIDE_RANK: Final = "x-override-routed-dp-rank"
OWNER: Final = "x-dp-owner"
"""``IP:port`` of the process of the service that scheduled the request and has its reservations."""
LEG: Final = "x-dp-leg"
"""Unguessable token of one attempt, by which the ext_proc stream of the prefill leg finds that attempt."""
WATCH: Final = "x-dp-watch"
"""Present if Envoy is to send the first event of the response to the service."""
WATCH_ALL: Final = "all"
"""Value of :data:`WATCH` if Envoy is to send the whole response to the service, which may change it."""
RETRY: Final = "x-dp-retry"
"""Response header: the front door is to repeat the request."""
FAILED: Final = "x-dp-failed"
"""Response header beside :data:`RETRY`: the endpoints of the attempt that failed."""
AVOID: Final = "x-dp-avoid"
"""Request header of a repeated request: the values of :data:`FAILED` of all earlier attempts."""
SESSION: Final = "x-dp-session"
"""Name that the client gives to a conversation; Envoy copies it from the header of ``envoy.session_header``."""

OWNED_PREFIX: Final = "x-dp-"
"""Prefix of the headers between Envoy and the service. Envoy lets none pass from clients, to engines or from them."""

UNTRUSTED_PREFIXES: Final = (OWNED_PREFIX, OVERRIDE_PREFIX, "x-envoy-")
"""Prefixes of untrusted headers. From a client they would steer Envoy, or override the DP rank in the body."""
RANK_HEADER: Final = "x-data-parallel-rank"
"""Request header from which SGLang and vLLM read the DP rank."""
UNTRUSTED_NAMES: Final = (RANK_HEADER,)
"""Untrusted headers by full name. In SGLang this one takes precedence over ``routed_dp_rank`` in the body."""

AUTHORIZATION: Final = "authorization"
PASSED_TO_PREFILL: Final = ("traceparent", "tracestate", "x-request-id", AUTHORIZATION)
"""Request headers of the client that a prefill leg of the service has, too. The API key of a pool replaces the last."""

READ_FROM_REQUESTS: Final = frozenset({
    ":method", ":path", "content-type", "content-encoding", "content-length", SESSION, AVOID,
})  # fmt: skip
"""Request headers that the service reads. Envoy forwards no others to it, but for :data:`PASSED_TO_PREFILL` where the
service sends prefill legs."""
READ_BEHIND_GATEWAY: Final = READ_FROM_REQUESTS.union(PASSED_TO_PREFILL) - {SESSION, AVOID}
"""Request headers that the service reads behind another gateway, where a client may have set those of this project."""
READ_FROM_RESPONSES: Final = frozenset({":status", "content-type", "content-encoding"})
"""Response headers that the service reads."""
READ_FROM_LOCAL_REPLIES: Final = frozenset({FAILED})
"""Headers that the service reads from responses that Envoy makes itself. Envoy removes them from those of engines."""

DESTINATION: Final = "x-gateway-destination-endpoint"
"""Endpoint-picker protocol: ``IP:port`` of the pick, as a header and as metadata in :data:`LB_NAMESPACE`."""
DESTINATION_SUBSET: Final = "x-gateway-destination-endpoint-subset"
"""Endpoint-picker protocol: the endpoints to pick from, in request metadata of :data:`SUBSET_NAMESPACE`."""
DESTINATION_SERVED: Final = "x-gateway-destination-endpoint-served"
"""Endpoint-picker protocol: the endpoint that responded, in response metadata of :data:`LB_NAMESPACE`."""
LB_NAMESPACE: Final = "envoy.lb"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"

METADATA_NAMESPACE: Final = "dp_extproc"
"""Namespace of the dynamic metadata of a request, which access logs print."""

META_MODEL: Final = "model"
META_POOL: Final = "pool"
META_GROUP: Final = "group"
META_PREFILL_HOST: Final = "prefill_host"
META_PREFILL_RANK: Final = "prefill_rank"
META_DECODE_HOST: Final = "decode_host"
META_DECODE_RANK: Final = "decode_rank"
META_REASON: Final = "reason"
"""Metadata of refusals only. With it, Envoy keeps the body that the service gave to the local reply."""
REASON_HEADER: Final = "x-dp-extproc-reason"
"""Response header of a refusal: its reason, the same text as in the body."""

STAGE: Final = "x-dp-stage"
"""Initial metadata of an ext_proc stream: which stream of its attempt it is."""
FIRST_EVENT: Final = "first-event"
"""The stage of the stream of the first event, which :data:`WATCH` requests."""

SET_INSIDE: Final = (
    DECODE_HOST, PREFILL_HOST, PREFILL_PREFIX, PREFIX_LENGTH, PREFILL_RID, PREFILL_RANK, OWNER, LEG, WATCH, RETRY,
    FAILED, AVOID, STAGE,
)  # fmt: skip
"""Headers of this project that must be absent before scheduling: all but :data:`SESSION`, which the front door sets."""

CUT: Final = "cut"
"""Begins the third item of an attempt whose failure Envoy itself reports, after its prefill and its decode endpoint."""
_MAX_ATTEMPTS: Final = 16
"""Bounds the attempts that are read from a header. More cannot be configured."""


_TERMINATED: Final = "UC"
"""Envoy's response flag of a connection that was closed after the request had been sent on it."""
_LOST: Final = "lost"
_ERROR: Final = "error"
_WITHIN: Final = "!"
"""Separates the items of a mark. No address has it."""


class EngineError(NamedTuple):
    """An error of 500 or more that an engine has answered, and that counts against no endpoint yet."""

    address: str
    signature: str
    """What errors alike have in common."""


def read_failed(header: str | None) -> tuple[frozenset[str], ...]:
    """Parse :data:`AVOID` into the endpoints of each earlier attempt."""
    return tuple(frozenset(filter(_is_address, attempt)) for attempt in _attempts(header))


def read_cut(header: str | None) -> str | None:
    """Return the decode endpoint of the last attempt if Envoy repeated it by itself, so that its failure can count."""
    last = (header or "").rpartition(";")[2].split(",")
    return last[1] if _is_cut(last) else None


def is_loss(header: str) -> bool:
    """Return whether the value of :data:`FAILED` in Envoy's own response means that decode had accepted the request."""
    return _is_loss(header.split(","))


def read_lost(header: str | None) -> tuple[str, ...]:
    """Return the endpoints that have dropped the request after they had accepted it, one for each such attempt."""
    found = []
    for attempt in _attempts(header):
        if _is_loss(attempt):
            found.append(attempt[1])
        found += [mark[1] for mark in _marks(attempt, _LOST, 2)]
    return tuple(found)


def read_error(header: str | None) -> EngineError | None:
    """Return the engine's error that the last attempt has failed by."""
    last = (header or "").rpartition(";")[2].split(",")
    return next((EngineError(mark[1], mark[2]) for mark in _marks(last, _ERROR, 3)), None)


def write_failed(*endpoints: str, mark: str = "") -> bytes:
    """Format the endpoints of one attempt, and its mark, as the value of :data:`FAILED`."""
    return ",".join((*endpoints, mark) if mark else endpoints).encode()


def write_cut(flags: str) -> str:
    """Mark an attempt whose failure Envoy itself reports, with its response flags."""
    return _WITHIN.join((CUT, flags))


def write_lost(address: str) -> str:
    """Mark an attempt whose endpoint has dropped the request after it had accepted it."""
    return _WITHIN.join((_LOST, address))


def write_error(error: EngineError) -> str:
    """Mark an attempt that has failed by an engine's error."""
    return _WITHIN.join((_ERROR, *error))


def _attempts(header: str | None) -> list[list[str]]:
    attempts = header.split(";", _MAX_ATTEMPTS)[:_MAX_ATTEMPTS] if header else []
    return [attempt.split(",") for attempt in attempts]


def _is_address(item: str) -> bool:
    return item != CUT and _WITHIN not in item


def _is_cut(attempt: list[str]) -> bool:
    return len(attempt) > 2 and attempt[2].partition(_WITHIN)[0] == CUT


def _is_loss(attempt: list[str]) -> bool:
    """Return whether the decode endpoint had accepted an attempt; further flags follow as items of their own."""
    return _is_cut(attempt) and _TERMINATED in {attempt[2].partition(_WITHIN)[2], *attempt[3:]}


def _marks(attempt: list[str], kind: str, items: int) -> list[list[str]]:
    marks = (item.split(_WITHIN) for item in attempt)
    return [mark for mark in marks if mark[0] == kind and len(mark) == items]
