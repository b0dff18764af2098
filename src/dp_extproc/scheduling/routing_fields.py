"""Encodes a request for its targets: the routing fields by which its legs run on their ranks, and find each other.

:mod:`dp_extproc.request.rewrite` writes them into the body, or as headers.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.engines.model import in_url
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.rewrite import (
    ROUTING_KEYS,
    Bootstrap,
    Headers,
    LegBodies,
    LegFields,
    override_headers,
    rewrite_aggregated,
    rewrite_disaggregated,
)

PREFILL_SUFFIX: Final = "p"
DECODE_SUFFIX: Final = "d"
"""Ends of the request ids of the two legs."""


class LegEncoding(Struct, frozen=True):
    """A request as it leaves for its targets."""

    body: bytes | None
    """The new body; None leaves the client's."""
    headers: Headers
    bodies: LegBodies | None = None
    """The bodies of both legs, if they differ."""


def encode_aggregated(request: InferenceRequest, target: Target) -> LegEncoding:
    """Encode a request to an aggregated pool, with its rank in the body or in a header, as the engine reads it."""
    takes = target.endpoint.capabilities
    body = rewrite_aggregated(request.body, takes.aggregated_rank_key(request.api), target.rank)
    if target.rank is None or request.api not in takes.rank_header_on:
        return LegEncoding(body, ())
    return LegEncoding(body, ((contract.RANK_HEADER, b"%d" % target.rank),))


def encode_legs(
    request: InferenceRequest,
    prefill: Target,
    decode: Target,
    rooms: int | Sequence[int],
    request_id: str,
    *,
    in_headers: bool,
) -> LegEncoding:
    """Encode both legs of a request to a disaggregated pool.

    There is one bootstrap room, or one for each prompt of a batch. *request_id* begins the ids of both legs.
    With *in_headers* the routing fields stand in headers where these can hold them.
    """
    rank = prefill.global_rank
    fields = (
        _leg_fields(prefill, rank, f"{request_id}{PREFILL_SUFFIX}"),
        _leg_fields(decode, rank, f"{request_id}{DECODE_SUFFIX}"),
    )
    bootstrap = _bootstrap(prefill.endpoint, rooms)
    if not request.is_read:
        # Or the ranks that the client's body may name would count.
        assert all(each.routed_rank is not None and each.prefill_rank is not None for each in fields)  # noqa: S101
    if not request.is_read or (in_headers and _fits_headers(request, prefill, decode)):
        return LegEncoding(None, override_headers(bootstrap, *fields))
    bodies = rewrite_disaggregated(request.body, request.prompt.batch, bootstrap, *fields)
    return LegEncoding(bodies.decode, (), bodies)


def mirror_headers(bodies: LegBodies) -> Headers:
    """Return the headers by which Envoy makes the body of the prefill leg from a mirrored request."""
    length = b"%d" % bodies.preamble_length
    return (contract.PREFILL_PREFIX, bodies.prefill_preamble), (contract.PREFIX_LENGTH, length)


def _fits_headers(request: InferenceRequest, prefill: Target, decode: Target) -> bool:
    """Return whether headers can hold all routing fields of a request.

    Headers hold no lists, and cannot keep the prefill leg from streaming. Where they have no value for a routing field,
    they cannot replace the one of the client's body.
    """
    apis = prefill.endpoint.capabilities.overrides_on & decode.endpoint.capabilities.overrides_on
    return (
        request.api in apis
        and request.prompt.batch is None
        and not request.stream
        and request.body.values.keys().isdisjoint(ROUTING_KEYS)
    )


def _bootstrap(prefill: EndpointLoad, rooms: int | Sequence[int]) -> Bootstrap:
    endpoint = prefill.configured
    port = endpoint.bootstrap_port or prefill.facts.bootstrap_port
    assert port is not None  # noqa: S101 - the facts of every prefill engine have one, by default or assumed at least
    # Up to 0.5.9 decode makes a URL of the value as it is, so IPv6 has to come in brackets; later releases take both.
    return Bootstrap(in_url(endpoint.bootstrap_host or endpoint.host), port, rooms)


def _leg_fields(target: Target, prefill_rank: int | None, request_id: str) -> LegFields:
    return LegFields(
        routed_rank=target.rank if target.routed else None,
        prefill_rank=prefill_rank if target.endpoint.capabilities.takes_prefill_rank else None,
        request_id=request_id,
    )
