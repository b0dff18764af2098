"""What tells both legs of a disaggregated request where to run and meet: their bodies, or headers."""

from collections.abc import Sequence

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.engines.model import in_url
from dp_extproc.engines.sglang.server_info import DEFAULT_BOOTSTRAP_PORT
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.overrides import Headers, override_headers
from dp_extproc.request.rewrite import ROUTING_KEYS, Bootstrap, LegFields, rewrite_disaggregated
from dp_extproc.scheduling.picker import Pair


class LegEncoding(Struct, frozen=True):
    """A request as it leaves for its pair."""

    body: bytes | None
    """The new body; None leaves the client's."""
    headers: Headers


def carry(
    request: InferenceRequest, pair: Pair, rooms: int | Sequence[int], number: str, *, in_headers: bool
) -> LegEncoding:
    """Tell both legs.

    Args:
        request: What the client wants.
        pair: Where it goes.
        rooms: One, or one for each prompt of a batch.
        number: Of the attempt, for the request ids of its legs.
        in_headers: Whether headers are to be used where they can.
    """
    meeting, fields = _meeting(pair.prefill.endpoint, rooms), _fields(pair, number)
    if not request.is_read:
        # Or what the client's body says of ranks would count.
        assert all(each.routed_rank is not None and each.prefill_rank is not None for each in fields)  # noqa: S101
        return LegEncoding(None, override_headers(meeting, *fields))
    if in_headers and _fits_headers(request, pair):
        return LegEncoding(None, override_headers(meeting, *fields))
    bodies = rewrite_disaggregated(request.body, request.prompt.batch, meeting, *fields)
    swap = ((contract.PREFILL_PREFIX, bodies.prefill_prefix), (contract.PREFIX_LENGTH, b"%d" % bodies.prefix_length))
    return LegEncoding(bodies.decode, swap)


def _fits_headers(request: InferenceRequest, pair: Pair) -> bool:
    """Tell whether headers can say it all.

    They carry no lists, cannot keep the prefill leg from streaming, and cannot take back what the client's body says of
    ranks and rooms where they have nothing to say instead.
    """
    apis = pair.prefill.endpoint.capabilities.overrides_on & pair.decode.endpoint.capabilities.overrides_on
    return (
        request.api in apis
        and request.prompt.batch is None
        and not request.stream
        and request.body.values.keys().isdisjoint(ROUTING_KEYS)
    )


def _meeting(prefill: EndpointLoad, rooms: int | Sequence[int]) -> Bootstrap:
    endpoint = prefill.configured
    port = endpoint.bootstrap_port or prefill.facts.bootstrap_port or DEFAULT_BOOTSTRAP_PORT
    # Up to 0.5.9 decode makes a URL of the host as it is, so IPv6 has to come in brackets; later releases take both.
    return Bootstrap(in_url(endpoint.bootstrap_host or endpoint.host), port, rooms)


def _fields(pair: Pair, number: str) -> tuple[LegFields, LegFields]:
    rank = pair.prefill.global_rank
    return _leg_fields(pair.prefill, rank, f"dp{number}p"), _leg_fields(pair.decode, rank, f"dp{number}d")


def _leg_fields(side: Target, prefill_rank: int | None, request_id: str) -> LegFields:
    return LegFields(
        routed_rank=side.rank if side.routed else None,
        prefill_rank=prefill_rank if side.endpoint.capabilities.takes_prefill_rank else None,
        request_id=request_id,
    )
