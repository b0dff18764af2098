"""How much a rank may have on its books, and whether a prompt can ever fit.

With prefill/decode disaggregation SGLang itself refuses nothing, however long its queues are, so this is the only
admission control there is.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from dp_extproc.config.reliability import AdmissionSettings, QueueSettings
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.rank import RankLoad
from dp_extproc.request.prompt import Prompt

_CERTAIN = 4
"""A prompt that is estimated so many times longer than what fits is too long for certain: no text is misjudged more."""


class Admission:
    """The limits of one pool's ranks."""

    __slots__ = ("_settings", "is_off")

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        limits = (settings.max_token_ratio, settings.max_request_ratio, settings.max_tokens, settings.max_requests)
        self.is_off = all(limit is None for limit in limits)

    def has_room(self, host: EndpointLoad, rank: int | None, tokens: float, requests: float) -> bool:
        """Tell whether a rank takes a request; without a rank, whether any rank of the host does."""
        if self.is_off:
            return True
        if rank is not None:
            return self.fits(host.ranks[rank], tokens, requests)
        return any(self.fits(each, tokens, requests) for each in host.candidate.ranks)

    def fits(self, rank: RankLoad, tokens: float, requests: float) -> bool:
        """Tell whether this very rank takes a request."""
        if not rank.open and not rank.external_requests:
            return True  # whatever does not fit here fits nowhere
        settings, sample = self._settings, rank.sample
        load = rank.tokens + tokens
        total = rank.reserved_requests + rank.external_requests + requests
        if settings.max_tokens is not None and load > settings.max_tokens:
            return False
        if settings.max_requests is not None and total > settings.max_requests:
            return False
        if sample is None:
            return True
        capacity, running = sample.capacity_tokens, sample.max_running_requests
        if settings.max_token_ratio is not None and capacity and load > settings.max_token_ratio * capacity:
            return False
        return settings.max_request_ratio is None or not running or total <= settings.max_request_ratio * running


def largest_capacity(hosts: Sequence[EndpointLoad]) -> int | None:
    """Give the KV cache of the largest rank, in tokens; None if any server does not tell."""
    largest = 0
    for host in hosts:
        for rank in host.ranks:
            if rank.sample is None or not rank.sample.capacity_tokens:
                return None
            largest = max(largest, rank.sample.capacity_tokens)
    return largest or None


def may_hold(hosts: Iterable[EndpointLoad], tokens: float) -> bool:
    """Tell whether some rank can hold so many tokens, or does not tell; as a rule the first one is enough."""
    return any(
        rank.sample is None or not rank.sample.capacity_tokens or tokens <= rank.sample.capacity_tokens
        for host in hosts
        for rank in host.ranks
    )


def is_too_long(prompt: Prompt, estimate: float, capacity: int) -> bool:
    """Tell whether a single prompt can fit on no rank for certain; a batch is spread over time, so it can."""
    return least_tokens(prompt, estimate) > capacity


def least_tokens(prompt: Prompt, estimate: float) -> float:
    """Give what a rank has to hold at one time for a prompt, for certain."""
    return 0.0 if prompt.batch is not None and prompt.batch > 1 else max(prompt.tokens, estimate / _CERTAIN)


class Ticket:
    """The place of one request in the admission queue."""

    __slots__ = ("_number", "pool", "priority", "wake")

    def __init__(self, pool: str, priority: int, number: int, wake: Callable[[], None]) -> None:
        self.pool = pool
        self.priority = priority
        self._number = number
        self.wake = wake
        """Called when a rank may have room for the request."""

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

    def enqueue(self, pool: str, priority: int, wake: Callable[[], None]) -> Ticket | None:
        """Add a request; None if the queue is full."""
        if self._length >= self.settings.max_depth:
            return None
        ticket = Ticket(pool, priority, next(self._numbers), wake)
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
        """Tell whether a request has to wait because others were there before.

        Args:
            pool: The pool that serves the request.
            priority: The priority of the request; greater ones are served first.
            ticket: Its own place in the queue; None if it has none.
        """
        tickets = self._tickets.get(pool)
        if not tickets or tickets[0] is ticket:
            return False
        return ticket is not None or tickets[0].priority >= priority
