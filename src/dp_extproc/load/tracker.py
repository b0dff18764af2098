"""The one place where attempts come on the books: our own, and those that other replicas tell of."""

from collections.abc import Callable
from functools import partial
from itertools import count

from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.in_flight import ERROR, NOBODY, InFlight, InFlightListener, nothing
from dp_extproc.load.records import PlacementRecord
from dp_extproc.load.request_cost import RequestCost
from dp_extproc.load.step_group import Reservation


class InFlightTracker:
    """Opens attempts. What they hold stands in the load cache."""

    def __init__(
        self, fleet: LoadCache, observer: InFlightListener = NOBODY, made_room: Callable[[], None] = nothing
    ) -> None:
        """Set up.

        Args:
            fleet: The load cache.
            observer: Told of our own attempts.
            made_room: Called when something has left the books, whoever had sent it.
        """
        self._fleet = fleet
        self._observer = observer
        self._made_room = made_room
        self._numbers = count(1)

    def open(
        self,
        prefill: Target | None,
        decode: Target,
        demand: RequestCost,
        now: float,
        *,
        leg: str = "",
        streaming: bool = False,
    ) -> InFlight:
        """Reserve what a request of this replica needs on both of its targets.

        Args:
            prefill: None for an endpoint of an aggregated pool, whose one rank computes the prompt, too.
            decode: The target that answers the client.
            demand: What the request costs.
            now: The time of the pick.
            leg: Token by which the prefill leg's own ext_proc stream finds the request.
            streaming: Whether the head of the response may come before any of it is computed.
        """
        computing = prefill or decode
        if prefill is not None:
            _count_pick(prefill)
        _count_pick(decode)
        self._note_prefix(computing, demand)
        attempt = InFlight(
            next(self._numbers),
            now,
            () if prefill is None else _reserve(prefill, demand, now),
            _reserve(decode, demand, now),
            prefill_endpoint=None if prefill is None else prefill.endpoint,
            decode_endpoint=decode.endpoint,
            leg=leg,
            streaming=streaming,
            observer=self._observer,
            on_prefill_answer=partial(self._prompt_done, computing.endpoint, demand),
            made_room=self._made_room,
        )
        if self._observer is not NOBODY:
            self._observer.dispatched(attempt.number, _dispatch(decode, demand, prefill), now)
        return attempt

    def open_peer(self, dispatch: PlacementRecord, at: float) -> InFlight:
        """Put on the books what another replica has sent. Servers that are not known here are left out."""
        demand, cached = dispatch.demand, min(dispatch.cached, dispatch.demand.tokens)
        prefill = self._side(dispatch.prefill, dispatch.prefill_rank, cached)
        decode = self._side(dispatch.decode, dispatch.decode_rank, 0.0 if dispatch.prefill else cached)
        computing = prefill if dispatch.prefill else decode
        if computing is not None:
            self._note_prefix(computing, demand)
        done = None if computing is None else partial(self._prompt_done, computing.endpoint, demand)
        # Streaming, as its replica tells when the prompt is computed.
        return InFlight(
            0,
            at,
            () if prefill is None else _reserve(prefill, demand, at),
            () if decode is None else _reserve(decode, demand, at),
            prefill_endpoint=None if prefill is None else prefill.endpoint,
            decode_endpoint=None if decode is None else decode.endpoint,
            streaming=True,
            on_prefill_answer=done,
            made_room=self._made_room,
        )

    def _prompt_done(self, host: EndpointLoad, demand: RequestCost, status: int) -> None:
        """Learn from a prompt that was computed, whoever has sent it."""
        ratio = self._fleet.ratios.get(host.pool)  # the pool may be configured no more
        if status < ERROR and ratio is not None:
            ratio.answered(host.url, demand.text_bytes, demand.known_tokens)

    def _note_prefix(self, side: Target, demand: RequestCost) -> None:
        """Take note that a rank is going to hold the KV cache of a prompt."""
        if side.rank is None or not side.endpoint.facts.prefix_cache:
            return
        rank = side.endpoint.ranks[side.rank]
        index = self._fleet.prefixes[side.endpoint.pool]
        capacity = rank.sample.capacity_tokens if rank.sample is not None else None
        index.note(rank, demand.prefix, demand.tokens, capacity)
        if demand.session is not None:
            index.note_session(demand.session, rank, demand.tokens)

    def _side(self, url: str | None, rank: int | None, cached: float) -> Target | None:
        host = None if url is None else self._fleet.by_url.get(url)
        if host is None or (rank is not None and not 0 <= rank < len(host.ranks)):
            return None
        return Target(host, rank, routed=False, by_room=False, cached=cached)


def _reserve(side: Target, demand: RequestCost, now: float) -> tuple[Reservation, ...]:
    return side.endpoint.reserve(side.rank, demand.tokens, now, demand.requests, side.cached)


def _count_pick(side: Target) -> None:
    """Count our own picks alone, so that those of all replicas add up."""
    if side.rank is not None:
        side.endpoint.ranks[side.rank].picks += 1


def _dispatch(decode: Target, demand: RequestCost, prefill: Target | None = None) -> PlacementRecord:
    return PlacementRecord(
        pool=decode.endpoint.pool,
        demand=demand,
        decode=decode.endpoint.url,
        decode_rank=decode.rank,
        prefill=None if prefill is None else prefill.endpoint.url,
        prefill_rank=None if prefill is None else prefill.rank,
        cached=(prefill or decode).cached,
    )
