"""Matches: which prefill endpoints of a pool can be paired with which decode endpoints, if not all with all."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from dp_extproc.engines.compatibility import PairingKey, difference, group_of_pair
from dp_extproc.load.endpoint import EndpointLoad


class Match(Struct, frozen=True):
    """Prefill endpoints and decode endpoints, of which any two can be paired."""

    prefills: Sequence[EndpointLoad]
    """Empty for an aggregated pool."""
    decodes: Sequence[EndpointLoad]
    """The endpoints that may answer the client."""


def find_matches(prefills: Sequence[EndpointLoad], decodes: Sequence[EndpointLoad]) -> tuple[Match, ...] | None:
    """Group the endpoints of a pool by what they can be paired with; None if all can be paired with all.

    Each prefill endpoint is in at most one match. A decode endpoint may be in several.
    """
    kinds = dict.fromkeys(decode.pairing_key for decode in decodes)
    fitting = _fitting(prefills, kinds, lambda _: True)
    return None if all(len(fits) == len(kinds) for fits in fitting.values()) else _matches(prefills, decodes, fitting)


def matches_of_groups(
    prefills: Sequence[EndpointLoad], decodes: Sequence[EndpointLoad], wanted: Callable[[str | None], bool]
) -> tuple[Match, ...]:
    """Group those endpoints of a pool that form pairs of some revision groups, by what they can be paired with there.

    *wanted* returns whether the group of a pair is one of these. Its argument is None for a pair without a group.
    """
    return _matches(prefills, decodes, _fitting(prefills, dict.fromkeys(each.pairing_key for each in decodes), wanted))


_Fitting = dict[PairingKey, frozenset[PairingKey]]
"""For each kind of prefill endpoints the kinds of decode endpoints that it can be paired with."""


def _fitting(
    prefills: Sequence[EndpointLoad], kinds: dict[PairingKey, None], wanted: Callable[[str | None], bool]
) -> _Fitting:
    return {
        kind: frozenset(
            other
            for other in kinds
            if difference(kind, other) is None and wanted(group_of_pair(kind.group, other.group))
        )
        for kind in dict.fromkeys(prefill.pairing_key for prefill in prefills)
    }


def _matches(prefills: Sequence[EndpointLoad], decodes: Sequence[EndpointLoad], fitting: _Fitting) -> tuple[Match, ...]:
    return tuple(
        Match(
            [prefill for prefill in prefills if fitting[prefill.pairing_key] == fits],
            [decode for decode in decodes if decode.pairing_key in fits],
        )
        for fits in dict.fromkeys(fitting.values())
        if fits
    )
