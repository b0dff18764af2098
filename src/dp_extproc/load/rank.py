"""One DP rank as its engine reports it, and the reservations on it.

Ranks and reservations are records. Their step group changes them, and owns the arithmetic of what they add up to.
"""

import math
from collections import deque
from typing import Final, Protocol

from dp_extproc.engines.model import RankSample

_ENDED_KEPT: Final = 10_000
"""Ended reservations that a rank remembers for the next sample. It bounds the memory of a rank that is never sampled;
between two samples no rank serves so many requests."""


class Group(Protocol):
    """What a rank needs of its step group, whose lists have one number per rank."""

    loads: list[float]
    external: list[float]
    uncached: list[float]

    def reserve(
        self, rank: "RankLoad", tokens: float, now: float, requests: float, cached: float, *, is_share: bool
    ) -> "Reservation": ...
    def first_token(self, reservation: "Reservation", now: float) -> None: ...
    def end(self, reservation: "Reservation", now: float, *, served: bool) -> None: ...
    def cost(self, position: int, after: float) -> float: ...


class Reservation:
    """A request on one rank, from the pick until an event ends it."""

    __slots__ = (
        "first_token_at", "is_share", "rank", "requests", "running", "since", "to_compute", "tokens", "until",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, rank: "RankLoad", tokens: float, to_compute: float, requests: float, since: float, *, is_share: bool
    ) -> None:
        self.rank = rank
        self.tokens = tokens
        """Tokens of the prompt."""
        self.to_compute = to_compute
        """Tokens of the prompt that this rank has to compute; 0 on decode endpoints."""
        self.requests = requests
        """Sequences that the request makes, or the rank's share of them."""
        self.since = since
        """When the rank was picked."""
        self.is_share = is_share
        """Whether the engine picks the rank, so that one of several ranks has the request and each has a share."""
        self.until = math.inf
        """When the reservation ceased to show in samples."""
        self.first_token_at = math.inf
        self.waiting = 0.0
        """Prompt tokens that no prefill step has taken in yet."""
        self.running = 0.0
        """Prompt tokens in the running prefill step."""

    def first_token(self, now: float) -> None:
        """Note that the first output token has come."""
        self.rank.group.first_token(self, now)

    def complete(self, now: float) -> None:
        """End the reservation: the engine has served the request.

        Of this and :meth:`cancel` only the first call has an effect, so that every way out may call one of them.
        """
        self.rank.group.end(self, now, served=True)

    def cancel(self, now: float) -> None:
        """End the reservation of a request that was not served; this is no evidence of how far the engine is."""
        self.rank.group.end(self, now, served=False)


class RankLoad:
    """One DP rank of one endpoint. Its loads are in the lists of its step group, in tokens."""

    __slots__ = (
        "ended", "external_requests", "group", "index", "open", "picks", "position", "reserved_requests", "sample",
        "sampled_at",
    )  # fmt: skip

    def __init__(self, index: int, group: Group, position: int) -> None:
        self.index = index
        """The DP rank in its engine."""
        self.group = group
        self.position = position
        """The index of the rank in the lists of its group."""
        self.picks = 0
        """Requests for which this replica has picked the rank."""
        self.external_requests = 0.0
        """Requests that the last sample has beyond the reservations."""
        self.reserved_requests = 0.0
        """Sequences of all open reservations; a batch has many, and a share of a request a fraction."""
        self.sample: RankSample | None = None
        """The last sample."""
        self.sampled_at = -math.inf
        """When the engine took that sample, by the clock of this process; never later than it really was."""
        self.open: set[Reservation] = set()
        self.ended: deque[Reservation] = deque(maxlen=_ENDED_KEPT)
        """Ended reservations that the next sample may still contain, in the order of their ends."""

    @property
    def tokens(self) -> float:
        """The estimated load, which policies compare."""
        return self.group.loads[self.position]

    @property
    def external_tokens(self) -> float:
        """Tokens that the last sample has beyond the reservations."""
        return self.group.external[self.position]

    @property
    def reserved_tokens(self) -> float:
        """The part of the load that reservations cause."""
        return self.tokens - self.external_tokens

    @property
    def uncached_prompt_tokens(self) -> float:
        """Prompt tokens of all requests so far, less those that were expected in the rank's prefix cache."""
        return self.group.uncached[self.position]

    @property
    def kept_requests(self) -> float:
        """Sequences of reservations that the next sample may contain, whenever it was taken."""
        return sum(reservation.requests for kept in (self.open, self.ended) for reservation in kept)

    def reserve(
        self, tokens: float, now: float, requests: float = 1.0, cached: float = 0.0, *, is_share: bool = False
    ) -> Reservation:
        """Reserve what a request needs.

        Args:
            tokens: Tokens of the prompt.
            now: The time of the pick.
            requests: Sequences that the request makes; a fraction for a share of it.
            cached: Prompt tokens that are expected in the rank's prefix cache.
            is_share: Whether other ranks have the same reservation, because the engine picks one of them.
        """
        return self.group.reserve(self, tokens, now, requests, cached, is_share=is_share)
