"""Room for a request: what a rank may have in flight, what its KV cache can hold, and the queue that waits for room.

With prefill/decode disaggregation SGLang itself refuses nothing, however long its queues are. So this is the only
admission control there is.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterable
from itertools import count

from dp_extproc.config.reliability import AdmissionSettings, QueueSettings
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.load.records import NO_WORK, RequestCost, Work
from dp_extproc.load.step_group import RankLoad
from dp_extproc.request.prompt import Prompt

_LARGEST_ERROR = 4
"""Bounds the error of an estimate: no text has fewer tokens than the estimate divided by this. A smaller value would
refuse prompts that fit; a greater one would let prompts wait that never fit."""


class Admission:
    """The limits of what a rank may have in flight."""

    __slots__ = ("_is_off", "_settings")

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        limits = (settings.max_token_ratio, settings.max_request_ratio, settings.max_tokens, settings.max_requests)
        self._is_off = all(limit is None for limit in limits)

    def takes(self, target: Target, cost: RequestCost) -> bool:
        """Return whether a target has room for a request; if its engine picks the rank, whether any rank has."""
        if target.rank is None:
            return self.has_room(target.endpoint, cost)
        return self._is_off or self.fits(target.endpoint.ranks[target.rank], cost)

    def has_room(self, endpoint: EndpointLoad, cost: RequestCost) -> bool:
        """Return whether any rank of an endpoint has room for a request."""
        return self._is_off or any(self.fits(rank, cost) for rank in endpoint.candidate.ranks)

    def fits(self, rank: RankLoad, cost: RequestCost) -> bool:
        """Return whether a rank has room for a request. An idle one has: a low limit must not refuse it for ever."""
        if not rank.open and not rank.external_requests:
            return True
        settings, sample = self._settings, rank.sample
        tokens = rank.tokens + cost.tokens
        requests = rank.reserved_requests + rank.external_requests + cost.requests
        if settings.max_tokens is not None and tokens > settings.max_tokens:
            return False
        if settings.max_requests is not None and requests > settings.max_requests:
            return False
        if sample is None:
            return True
        capacity, running = sample.capacity_tokens, sample.max_running_requests
        if settings.max_token_ratio is not None and capacity and tokens > settings.max_token_ratio * capacity:
            return False
        return settings.max_request_ratio is None or not running or requests <= settings.max_request_ratio * running


def _capacity(rank: RankLoad) -> float:
    """Return the size of the KV cache of a rank, in tokens; infinite if it is unknown, so that any prompt may fit."""
    return math.inf if rank.sample is None else rank.sample.capacity_tokens or math.inf


def may_ever_hold(target: Target, cost: RequestCost) -> bool:
    """Return whether the KV cache of a picked rank may hold a prompt; if its engine picks the rank, that of rank 0."""
    sample = target.endpoint.ranks[target.rank or 0].sample
    return sample is None or cost.tokens <= (sample.capacity_tokens or math.inf)


def largest_capacity(endpoints: Iterable[EndpointLoad]) -> float:
    """Return the size of the largest KV cache of a rank, in tokens; infinite if that of any rank is unknown."""
    return max(_capacity(rank) for endpoint in endpoints for rank in endpoint.ranks)


def may_hold(endpoints: Iterable[EndpointLoad], tokens: float) -> bool:
    """Return whether the KV cache of some rank may hold so many tokens."""
    return any(tokens <= _capacity(rank) for endpoint in endpoints for rank in endpoint.ranks)


def least_tokens(prompt: Prompt, estimate: float) -> float:
    """Return the tokens that a rank certainly has to hold at one time for a prompt.

    For a batch that is unknown, and so 0: its prompts can run one by one.
    """
    return 0.0 if prompt.batch is not None and prompt.batch > 1 else max(prompt.tokens, estimate / _LARGEST_ERROR)


class Ticket:
    """The place of one request in the admission queue."""

    __slots__ = ("_number", "pool", "priority", "wake", "work")

    def __init__(self, pool: str, priority: int, number: int, wake: Callable[[], None], work: Work = NO_WORK) -> None:
        self.pool = pool
        self.priority = priority
        self._number = number
        self.wake = wake
        """Called when a rank may have room for the request."""
        self.work = work

    def __lt__(self, other: "Ticket") -> bool:
        return (-self.priority, self._number) < (-other.priority, other._number)


class AdmissionQueue:
    """Holds requests until a rank has room: by priority, then first in first out, each pool by itself."""

    def __init__(self, settings: QueueSettings) -> None:
        self.settings = settings
        self._tickets: dict[str, list[Ticket]] = {}
        """In order of service, by pool; a pool without a waiting request has no entry."""
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def waiting(self, pool: str) -> Work:
        """Return the work of all requests of a pool that wait."""
        tickets = self._tickets.get(pool, ())
        return Work(sum(each.work.tokens for each in tickets), sum(each.work.requests for each in tickets))

    def enqueue(self, pool: str, priority: int, wake: Callable[[], None], work: Work = NO_WORK) -> Ticket | None:
        """Add a request, with what to call when it may find room; None if the queue is full."""
        if self._length >= self.settings.max_depth:
            return None
        ticket = Ticket(pool, priority, next(self._numbers), wake, work)
        insort(self._tickets.setdefault(pool, []), ticket)
        self._length += 1
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Take a request out, whether it was scheduled or not, and wake the next one if it was the first."""
        tickets = self._tickets[ticket.pool]
        was_first = tickets[0] is ticket
        tickets.remove(ticket)
        self._length -= 1
        if not tickets:
            del self._tickets[ticket.pool]
        elif was_first:
            tickets[0].wake()

    def notify(self) -> None:
        """Wake the first request of each pool, as some rank may have room."""
        for tickets in self._tickets.values():
            tickets[0].wake()

    def must_wait(self, pool: str, priority: int, ticket: Ticket | None) -> bool:
        """Return whether others are served before a request. Its own ticket, if it has one, may be the next one."""
        tickets = self._tickets.get(pool)
        if not tickets or tickets[0] is ticket:
            return False
        return ticket is not None or tickets[0].priority >= priority
