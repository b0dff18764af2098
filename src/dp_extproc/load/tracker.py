"""The one place where in-flight requests are opened: those of this replica, and those that its peers publish."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

from dp_extproc.estimators.prefill_speed import ATTENTION_TOKENS
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.in_flight import ERROR, NO_LISTENER, InFlight, InFlightListener, nothing
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.load.step_group import Reservation


class InFlightTracker:
    """Opens in-flight requests, whose reservations are in the load cache."""

    def __init__(
        self, cache: LoadCache, listener: InFlightListener = NO_LISTENER, made_room: Callable[[], None] = nothing
    ) -> None:
        """Begin without requests. *made_room* is called when a reservation has ended, of whichever replica."""
        self._cache = cache
        self._listener = listener
        self._made_room = made_room
        self._numbers = count(1)

    def open(
        self,
        prefill: Target | None,
        decode: Target,
        cost: RequestCost,
        now: float,
        *,
        leg: str = "",
        streaming: bool = False,
    ) -> InFlight:
        """Reserve what a request of this replica needs on its targets, which were picked at *now*.

        Without a prefill target the decode target is an aggregated endpoint, which computes the prompt, too.
        :class:`InFlight` describes *leg* and *streaming*.
        """
        for target in (prefill, decode):
            if target is not None and target.rank is not None:
                target.endpoint.ranks[target.rank].picks += 1  # of this replica, so that those of all replicas add up
        number, listener = next(self._numbers), self._listener
        in_flight = self._open(
            number, prefill, decode, cost, now,
            computes=prefill or decode, listener=listener, leg=leg, streaming=streaming,
        )  # fmt: skip
        if listener is not NO_LISTENER:  # a record for nothing would slow the request path
            listener.opened(number, _record(prefill, decode, cost), now)
        return in_flight

    def open_peer(self, record: PlacementRecord, at: float) -> InFlight:
        """Reserve what a request of a peer needs, where its endpoints and ranks have been discovered."""
        cached = min(record.cached, record.cost.tokens)
        prefill = self._target(record.prefill, record.prefill_rank, cached)
        decode = self._target(record.decode, record.decode_rank, 0.0 if record.prefill else cached)
        computes = prefill if record.prefill else decode
        # Streaming, because the peer publishes when the prompt is computed.
        return self._open(0, prefill, decode, record.cost, at, computes=computes, listener=NO_LISTENER, streaming=True)

    def _open(
        self, number: int, prefill: Target | None, decode: Target | None, cost: RequestCost, now: float, *,
        computes: Target | None, listener: InFlightListener, leg: str = "", streaming: bool,
    ) -> InFlight:  # fmt: skip
        """Open the reservations of both legs; *computes* is the target that computes the prompt."""
        on_prefill_answer = None
        if computes is not None:
            self._record_prefix(computes, cost)
            self._cache.arrivals[computes.endpoint.pool].add(max(0.0, cost.tokens - computes.cached), now)
            on_prefill_answer = partial(self._prompt_done, computes.endpoint, cost, self._expected(computes))
        on_prefill = _reserve(prefill, cost, now)
        return InFlight(
            number,
            now,
            on_prefill,
            _reserve(decode, cost, now),
            prefill_endpoint=None if prefill is None else prefill.endpoint,
            decode_endpoint=None if decode is None else decode.endpoint,
            leg=leg,
            streaming=streaming,
            expected_prefill=0.0 if prefill is None else _expected_seconds(prefill.endpoint, on_prefill),
            listener=listener,
            on_prefill_answer=on_prefill_answer,
            made_room=self._made_room,
        )

    def _prompt_done(self, endpoint: EndpointLoad, cost: RequestCost, expected: float, status: int) -> None:
        """Learn from a computed prompt, of whichever replica, of which so many tokens were expected in cache."""
        if status >= ERROR:
            return
        endpoint.prefix_truth.computed(cost.tokens, expected)
        if (ratio := self._cache.ratios.get(endpoint.pool)) is not None:  # the pool may no longer be configured
            ratio.computed(endpoint.url, cost.text_bytes, cost.known_tokens, doubtful=cost.has_media)

    def _expected(self, target: Target) -> float:
        """Return the cached tokens that the prefix index has of a prompt, before any correction."""
        if target.rank is None or not target.cached:
            return 0.0
        return target.cached / self._cache.prefixes[target.endpoint.pool].share(target.endpoint.ranks[target.rank])

    def _record_prefix(self, target: Target, cost: RequestCost) -> None:
        """Record that a rank will have the KV cache of a prompt."""
        if target.rank is None or not target.endpoint.facts.prefix_cache:
            return
        rank = target.endpoint.ranks[target.rank]
        index = self._cache.prefixes[target.endpoint.pool]
        capacity = rank.sample.capacity_tokens if rank.sample is not None else None
        index.note(rank, cost.prefix, cost.tokens, capacity)
        if cost.session is not None:
            index.note_session(cost.session, rank, cost.tokens)

    def _target(self, url: str | None, rank: int | None, cached: float) -> Target | None:
        endpoint = None if url is None else self._cache.by_url.get(url)
        if endpoint is None or (rank is not None and not 0 <= rank < len(endpoint.ranks)):
            return None
        return Target(endpoint, rank, routed=False, by_room=False, cached=cached)


def _expected_seconds(endpoint: EndpointLoad, reservations: Iterable[Reservation]) -> float:
    """Return the seconds until a prompt is computed that was just reserved, by the engine's own count; else 0."""
    longest = 0.0
    for reservation in reservations:
        group = reservation.rank.group
        if (per_token := endpoint.prefill_speeds[endpoint.groups.index(group)].seconds_per_token) is not None:
            prompt = reservation.to_compute
            ahead = max(prompt, group.loads[reservation.rank.position])  # its own tokens included
            longest = max(longest, per_token * (ahead + prompt * reservation.tokens / ATTENTION_TOKENS))
    return longest


def _reserve(target: Target | None, cost: RequestCost, now: float) -> tuple[Reservation, ...]:
    if target is None:
        return ()
    return target.endpoint.reserve(target.rank, cost.tokens, now, cost.requests, target.cached)


def _record(prefill: Target | None, decode: Target, cost: RequestCost) -> PlacementRecord:
    return PlacementRecord(
        pool=decode.endpoint.pool,
        cost=cost,
        decode=decode.endpoint.url,
        decode_rank=decode.rank,
        prefill=None if prefill is None else prefill.endpoint.url,
        prefill_rank=None if prefill is None else prefill.rank,
        cached=(prefill or decode).cached,
    )
