"""What a pair may be picked from: never two servers that are known not to work together.

The pair is picked one side at a time. So where not everybody can be paired with everybody, the choice of prefill is
narrowed to servers that leave a choice of decode, and that one to those that the picked prefill server can be paired
with. Whatever is done for want of better servers, such as taking one that is ejected, stays within that.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct

from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.health import avoidance, choose
from dp_extproc.load.matching import Match
from dp_extproc.request.body import InferenceRequest
from dp_extproc.scheduling.admission import least_tokens, may_hold
from dp_extproc.scheduling.decision import RequestContext
from dp_extproc.scheduling.subset import allows

_Quality = tuple[int, int, bool]
"""How well the servers are known, whether they have failed this request, whether they are ejected. Less is better."""


class Targets(Struct, frozen=True):
    """Servers of both roles."""

    prefills: Sequence[EndpointLoad]
    """At least one, each with a partner."""
    decodes: Sequence[EndpointLoad]
    """Likewise."""
    matches: Mapping[EndpointLoad, Match] | None = None
    """Of each prefill server; None if all can be paired with all. All prefill servers of a match share it."""

    def decodes_of(self, prefill: EndpointLoad) -> Sequence[EndpointLoad]:
        """Give the decode servers that a prefill server can be paired with, at least one."""
        return self.decodes if self.matches is None else self.matches[prefill].decodes

    def match_of(self, prefill: EndpointLoad) -> Match:
        """Give all that can be used together with a prefill server, itself among them."""
        return Match(self.prefills, self.decodes) if self.matches is None else self.matches[prefill]

    def only(self, wanted: Callable[[EndpointLoad], bool]) -> "Targets | None":
        """Give what is left with the wanted servers alone; None if that is no pair. Each is asked about once."""
        prefills = [host for host in self.prefills if wanted(host)]
        decodes = [host for host in self.decodes if wanted(host)]
        if self.matches is None:
            return _joined([Match(prefills, decodes)])
        kept = {*prefills, *decodes}
        return _joined(
            Match([host for host in match.prefills if host in kept], [host for host in match.decodes if host in kept])
            for match in {id(match): match for match in self.matches.values()}.values()
        )


def matching_sides(
    fleet: LoadCache, pool: str, request: InferenceRequest, now: float, circumstances: RequestContext
) -> Targets | None:
    """Choose among the matches of a pool those that can be used best; None if none can.

    Both sides count: a match whose only decode server is ejected is left alone while there is a sound one. But an
    ejected one may do by now, while servers that are too small for a prompt never do.
    """
    estimate, least = _tokens(fleet, pool, request)
    found = []
    for match in fleet.matches[pool]:
        prefills = _usable(fleet, match.prefills, request, now, circumstances)
        decodes = _usable(fleet, match.decodes, request, now, circumstances)
        if prefills is not None and decodes is not None:
            (known, failed, sick), (known_too, failed_too, sick_too) = prefills[0], decodes[0]
            usable = Match(prefills[1], decodes[1])
            worse = (
                not _may_hold(usable, least),
                max(known, known_too),
                max(failed, failed_too),
                sick or sick_too,
                not _may_hold(usable, estimate),  # which may be wrong
            )
            found.append((worse, usable))
    best = min((quality for quality, _ in found), default=None)
    return _joined(match for quality, match in found if quality == best)


def _joined(matches: Iterable[Match]) -> Targets | None:
    """Put matches together; their lists of decode servers are walked once for each match, not for each server."""
    left = [match for match in matches if match.prefills and match.decodes]
    if len(left) < 2:
        return Targets(left[0].prefills, left[0].decodes) if left else None
    of = {prefill: match for match in left for prefill in match.prefills}
    every = dict.fromkeys(decode for match in left for decode in match.decodes)
    return Targets(tuple(of), tuple(every), of)


def _tokens(fleet: LoadCache, pool: str, request: InferenceRequest) -> tuple[float, float]:
    """Give what a rank has to hold for a prompt, as estimated and at least; 0 where its size tells nothing of that."""
    estimate = fleet.ratios[pool].estimate(request.prompt)
    least = least_tokens(request.prompt, estimate)
    return (estimate, least) if least and request.is_read else (0.0, 0.0)  # one not read may be long for its pictures


def _may_hold(match: Match, tokens: float) -> bool:
    return may_hold(match.prefills, tokens) and may_hold(match.decodes, tokens)


def _usable(
    fleet: LoadCache,
    hosts: Sequence[EndpointLoad],
    request: InferenceRequest,
    now: float,
    circumstances: RequestContext,
) -> tuple[_Quality, Sequence[EndpointLoad]] | None:
    """Give the best of some hosts of one role, and how good they are; None if none can be used at all."""
    if (subset := circumstances.subset) is not None:
        hosts = [host for host in hosts if allows(subset, host.address)]
    freshness, hosts = fleet.best_known(hosts, now)
    capable = [host for host in hosts if _serves(host, request)]
    if not capable or freshness is None:
        return None
    chosen = choose(capable, circumstances.failed, now)
    is_sick = not any(host.health.takes(now) for host in chosen)
    return (freshness, avoidance(capable, circumstances.failed), is_sick), chosen


def _serves(host: EndpointLoad, request: InferenceRequest) -> bool:
    """Tell whether a host's release takes the routing fields of a request, wherever they have to stand."""
    takes = host.capabilities
    return takes.serves(request.api) and (request.is_read or request.api in takes.overrides_on)
