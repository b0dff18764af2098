"""Finds the endpoints that both targets of a request may be picked from: never two that are known not to work together.

Targets are picked one after the other. So where not every prefill endpoint can be paired with every decode endpoint:

1. The prefill target is picked from endpoints that can be paired with a usable decode endpoint.
2. The decode target is picked from those that can be paired with the picked prefill endpoint.
3. Whatever is done for want of better endpoints, such as picking an ejected one, stays within these.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from dp_extproc.engines.compatibility import Difference, differences
from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.matching import Match
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection
from dp_extproc.scheduling.admission import least_tokens, may_hold
from dp_extproc.scheduling.decision import RequestContext
from dp_extproc.scheduling.filters import EndpointFilter, for_role, freshest, preferred, serves

_SHOWN: Final = 4
"""Bounds the differences that one message names."""
_ALL_AGREE: Final = "all of them agree, but no two of them can serve this request now; try again shortly"

_Quality = tuple[int, int, bool]
"""Freshness, how far failed attempts were avoided, and whether all are ejected or not ready. Less is better."""
_AGGREGATED: Final = ((0, 0, False), ())
"""Stands for the prefill endpoints of a match that has none: they are as good as can be."""
PairQuality = tuple[bool, int, int, bool, bool]
"""The quality of both roles of a match, between whether they may not hold a prompt: certainly, and by the estimate."""


class Pairing(Struct, frozen=True):
    """The endpoints of both roles that the targets of a request may be picked from."""

    prefills: Sequence[EndpointLoad]
    """Empty for an aggregated pool; else at least one, each of which can be paired with some of ``decodes``."""
    decodes: Sequence[EndpointLoad]
    """At least one: the endpoints that may answer the client."""
    matches: Mapping[EndpointLoad, Match] | None = None
    """The match of each prefill endpoint, which all its prefill endpoints share; None if all can be paired with all."""

    def decodes_of(self, prefill: EndpointLoad) -> Sequence[EndpointLoad]:
        """Return the decode endpoints that a prefill endpoint can be paired with, at least one."""
        return self.decodes if self.matches is None else self.matches[prefill].decodes

    def scopes_of(self, prefill: Target | None) -> "Sequence[Pairing | Match]":
        """Return all that there is to pick from, and then, if that is less, what can be paired with a target."""
        return (self,) if self.matches is None or prefill is None else (self, self.matches[prefill.endpoint])

    def only(self, wanted: Callable[[EndpointLoad], bool]) -> "Pairing | None":
        """Return what is left with the wanted endpoints alone, each asked about once; None if that is no pair."""
        prefills = [each for each in self.prefills if wanted(each)]
        decodes = [each for each in self.decodes if wanted(each)]
        if self.matches is None:
            return Pairing(prefills, decodes) if decodes and (prefills or not self.prefills) else None
        kept = {*prefills, *decodes}
        left = (
            Match([each for each in match.prefills if each in kept], [each for each in match.decodes if each in kept])
            for match in {id(match): match for match in self.matches.values()}.values()
        )
        return _joined([match for match in left if match.prefills and match.decodes])


def find_pairing(
    filters: EndpointFilter,
    pool: str,
    request: InferenceRequest,
    context: RequestContext,
    now: float,
    *,
    is_disaggregated: bool,
) -> Pairing | Rejection:
    """Return what the targets of a request may be picked from, or its refusal."""
    if not is_disaggregated:
        endpoints = filters.usable(pool, Role.WORKER, request, context, now)
        return endpoints if isinstance(endpoints, Rejection) else Pairing((), endpoints)
    load = filters.load
    all_match = pool not in load.matches
    if not all_match and (best := best_pairing(load, pool, request, context, now)) is not None:
        return best
    prefills = filters.usable(pool, Role.PREFILL, request, context, now)
    if isinstance(prefills, Rejection):
        return prefills
    decodes = filters.usable(pool, Role.DECODE, request, context, now)
    if isinstance(decodes, Rejection):
        return decodes
    if all_match:
        return Pairing(prefills, decodes)
    # What differs among all whose facts are known counts only if those that are usable now agree.
    known = load.known(pool, Role.PREFILL), load.known(pool, Role.DECODE)
    found = _differences(prefills, decodes) or _differences(*known)
    reasons = "; ".join(f"{each} ({each.remedy})" for each in found[:_SHOWN])
    message = f"no prefill server for {pool} can be paired with a decode server that is there: {reasons or _ALL_AGREE}"
    return Rejection(503, Reason.NO_COMPATIBLE_PAIR, message, headers=TRY_AGAIN)


def best_pairing(
    load: LoadCache, pool: str, request: InferenceRequest, context: RequestContext, now: float
) -> Pairing | None:
    """Join those matches of a pool that are usable best; None if none is."""
    found = best_of(load, pool, request, context, now, matches=load.matches[pool])
    return None if found is None else found[1]


def best_of(
    load: LoadCache,
    pool: str,
    request: InferenceRequest,
    context: RequestContext,
    now: float,
    *,
    matches: Iterable[Match],
) -> tuple[PairQuality, Pairing] | None:
    """Join those of some matches of a pool that are usable best, with how good they are; None if none is usable.

    Both roles count: a match whose only decode endpoint is ejected is left out while there is a healthy one. But an
    ejected endpoint may work again by now, while a rank that is too small for a prompt never holds it.
    """
    estimate, least = _tokens(load, pool, request)
    of_prefill = for_role(context, Role.PREFILL)
    found: list[tuple[PairQuality, Match]] = []
    for match in matches:
        prefills = _usable(load, match.prefills, request, of_prefill, now) if match.prefills else _AGGREGATED
        decodes = _usable(load, match.decodes, request, context, now)
        if prefills is not None and decodes is not None:
            usable = Match(prefills[1], decodes[1])
            freshness, avoided, is_ejected = map(max, prefills[0], decodes[0])
            # The estimate comes after the others, as it may be wrong.
            too_long = not _may_hold(usable, least), not _may_hold(usable, estimate)
            found.append(((too_long[0], freshness, avoided, bool(is_ejected), too_long[1]), usable))
    best = min((quality for quality, _ in found), default=None)
    joined = _joined([match for quality, match in found if quality == best])
    return None if best is None or joined is None else (best, joined)


def _joined(matches: Sequence[Match]) -> Pairing | None:
    """Join matches; their lists of decode endpoints are walked once for each match, not for each prefill endpoint."""
    if len(matches) < 2:
        return Pairing(matches[0].prefills, matches[0].decodes) if matches else None
    of = {prefill: match for match in matches for prefill in match.prefills}
    every = dict.fromkeys(decode for match in matches for decode in match.decodes)
    return Pairing(tuple(of), tuple(every), of)


def _tokens(load: LoadCache, pool: str, request: InferenceRequest) -> tuple[float, float]:
    """Return the tokens of a prompt that a rank has to hold at a time, estimated and at least; 0 if that is unknown."""
    estimate = load.ratios[pool].estimate(request.prompt)
    least = least_tokens(request.prompt, estimate)
    return (estimate, least) if least and request.is_read else (0.0, 0.0)  # the size of a body may be that of images


def _may_hold(match: Match, tokens: float) -> bool:
    return (not match.prefills or may_hold(match.prefills, tokens)) and may_hold(match.decodes, tokens)


def _usable(
    load: LoadCache, endpoints: Sequence[EndpointLoad], request: InferenceRequest, context: RequestContext, now: float
) -> tuple[_Quality, Sequence[EndpointLoad]] | None:
    """Return the best of some endpoints of one role, and how good they are; None if none can be used at all."""
    freshness, endpoints = freshest(load, endpoints, now, context.subset)
    capable = [each for each in endpoints if serves(each, request.api, is_read=request.is_read)]
    if not capable or freshness is None:
        return None
    avoided, chosen = preferred(capable, context.avoided, now)
    is_avoided = not any(each.takes(now) for each in chosen)
    return (freshness, avoided, is_avoided), chosen


def _differences(prefills: Sequence[EndpointLoad], decodes: Sequence[EndpointLoad]) -> list[Difference]:
    return differences((each.pairing_key for each in prefills), (each.pairing_key for each in decodes))
