"""Narrows what a request may be picked from to revision groups: by configured weights, or to those of a failed attempt.

The rules, for disaggregated and for aggregated pools:

1. A retry stays in the group of the failed attempt if that is as usable as any other. After two failed attempts there,
   it goes to another one with a share, if that is as usable: all engines of a new revision may fail.
2. With weights, each named group gets its share of the requests. All other endpoints get the rest, as one part.
3. Only the parts that are usable best get requests. If a named group is not among them, the rest gets its share. If the
   rest is not, the named groups get everything in proportion.
4. Within what is left, load decides. Without weights it is all that decides, so requests follow capacity.

A sequence of evenly spread numbers decides whose turn it is, so shares also hold over a few requests. The name of a
conversation takes the place of such a number. So its requests go to one part while the weights stay: another revision
has none of its prefix cache, and may answer in another way.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from random import Random
from typing import Final

from dp_extproc.engines.model import Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.matching import Match, matches_of_groups
from dp_extproc.request.body import InferenceRequest
from dp_extproc.scheduling.decision import RequestContext
from dp_extproc.scheduling.pairing import Pairing, PairQuality, best_of

_GOLDEN: Final = 0.6180339887498949
"""Step between the numbers of the sequence: the fraction of the golden ratio. No other step spreads them as evenly."""
_DIGESTS: Final = 1 << 64
"""How many digests of eight bytes there are."""


class GroupShares:
    """Divides the requests of one pool among its revision groups."""

    def __init__(
        self,
        pool: str,
        weights: Mapping[str, float],
        load: LoadCache,
        rng: Random,
        *,
        is_disaggregated: bool,
        keeps_sessions: bool,
    ) -> None:
        """Set up.

        Args:
            pool: The name of the pool.
            weights: The share of the requests of each named group.
            load: The load cache.
            rng: Source of the first number of the sequence, as replicas must not take turns at the same time.
            is_disaggregated: Whether the pool has prefill and decode endpoints.
            keeps_sessions: Whether the requests of a conversation go to one part.
        """
        self._pool = pool
        self._weights = weights
        self._load = load
        self._rng = rng
        self._is_disaggregated = is_disaggregated
        self._keeps_sessions = keeps_sessions
        self._number: float | None = None
        """The present number of the sequence, from 0 to 1; None before the first."""
        self._matches: dict[str | None, tuple[Match, ...]] = {}
        """The matches of groups, as of an indexing of the load cache; under None those of all unnamed groups."""
        self._indexing = -1

    def narrow(self, request: InferenceRequest, context: RequestContext, now: float) -> Pairing | None:
        """Return what the targets of a request may be picked from; None if groups do not narrow it."""
        if context.failed and (narrowed := self._for_retry(request, context, now)) is not None:
            return narrowed
        if not self._weights:
            return None
        found = {
            group: part
            for group in (*self._weights, None)
            if (part := self._best_of(self._of(group), request, context, now)) is not None
        }
        best = min((quality for quality, _ in found.values()), default=None)
        return self._draw({group: part for group, (quality, part) in found.items() if quality == best}, context.session)

    def _for_retry(self, request: InferenceRequest, context: RequestContext, now: float) -> Pairing | None:
        """Return the group of the last failed attempt, or the others, if that is as usable as the pool; else None."""
        loads = (*self._load.draining, *self._load.discovered_in(self._pool))
        group_of = {load.address: load.group for load in loads if load.group is not None}
        groups = [{group_of[address] for address in failed if address in group_of} for failed in context.failed]
        if not groups[-1]:
            return None
        (last, *_) = groups[-1]
        if sum(last in each for each in groups) == 1:
            matches = self._of(last)
        else:
            avoided = {last, *(group for group, weight in self._weights.items() if not weight)}
            matches = self._find(lambda group: group not in avoided)
        best = self._best_of(matches, request, context, now)
        whole = self._best_of(self._whole(), request, context, now)
        return best[1] if best is not None and whole is not None and best[0] == whole[0] else None

    def _draw(self, parts: Mapping[str | None, Pairing], session: str | None) -> Pairing | None:
        """Return the part whose turn it is; None if only groups with a share of 0 are left, so load decides."""
        rest = parts.get(None)
        weights, total = self._weights, 1.0  # the rest takes the numbers of absent groups, so the others keep theirs
        if rest is None:
            weights = {group: weight for group, weight in weights.items() if group in parts}
            total = sum(weights.values())
            if not total:
                return None
        number = self._next(session) * total
        for group, weight in weights.items():
            number -= weight
            if number < 0:
                return parts.get(group, rest)
        return parts[group] if rest is None else rest  # rounding may leave the last named group out

    def _next(self, session: str | None) -> float:
        if session and self._keeps_sessions:
            return int.from_bytes(blake2b(session.encode(), digest_size=8).digest()) / _DIGESTS
        self._number = (self._rng.random() if self._number is None else self._number + _GOLDEN) % 1
        return self._number

    def _best_of(
        self, matches: tuple[Match, ...], request: InferenceRequest, context: RequestContext, now: float
    ) -> tuple[PairQuality, Pairing] | None:
        return best_of(self._load, self._pool, request, context, now, matches=matches)

    def _whole(self) -> tuple[Match, ...]:
        return self._load.matches.get(self._pool) or (Match(*self._known()),)

    def _of(self, group: str | None) -> tuple[Match, ...]:
        """Return the matches of a group, or those of all groups without a weight (None)."""
        if self._indexing != self._load.indexings:
            self._indexing = self._load.indexings
            self._matches.clear()
        if (found := self._matches.get(group)) is None:
            found = self._matches[group] = self._find(
                lambda other: other == group if group is not None else other not in self._weights
            )
        return found

    def _find(self, wanted: Callable[[str | None], bool]) -> tuple[Match, ...]:
        prefills, decodes = self._known()
        if self._is_disaggregated:
            return matches_of_groups(prefills, decodes, wanted)
        return (Match((), left),) if (left := [each for each in decodes if wanted(each.group)]) else ()

    def _known(self) -> tuple[Sequence[EndpointLoad], Sequence[EndpointLoad]]:
        """Return the endpoints of the pool: prefill, and those that may answer the client."""
        known, pool = self._load.known, self._pool
        if self._is_disaggregated:
            return known(pool, Role.PREFILL), known(pool, Role.DECODE)
        return (), known(pool, Role.WORKER)
