"""Matches: which prefill endpoints of a pool can be paired with which decode endpoints, if not all with all."""

from collections.abc import Sequence

from msgspec import Struct

from dp_extproc.engines.compatibility import by_pairing_key, difference, pairing_key
from dp_extproc.load.endpoint import EndpointLoad


class Match(Struct, frozen=True):
    """Prefill endpoints and decode endpoints, of which any two can be paired."""

    prefills: Sequence[EndpointLoad]
    decodes: Sequence[EndpointLoad]


def find_matches(prefills: Sequence[EndpointLoad], decodes: Sequence[EndpointLoad]) -> tuple[Match, ...] | None:
    """Group the endpoints of a pool by what they can be paired with; None if all can be paired with all.

    Each prefill endpoint is in at most one match. A decode endpoint may be in several.
    """
    kinds = by_pairing_key(decode.facts for decode in decodes)
    fitting = {
        kind: frozenset(other for other, facts in kinds.items() if difference(prefill, facts) is None)
        for kind, prefill in by_pairing_key(prefill.facts for prefill in prefills).items()
    }
    if all(len(fits) == len(kinds) for fits in fitting.values()):
        return None
    return tuple(
        Match(
            [prefill for prefill in prefills if fitting[pairing_key(prefill.facts)] == fits],
            [decode for decode in decodes if pairing_key(decode.facts) in fits],
        )
        for fits in dict.fromkeys(fitting.values())
        if fits
    )
