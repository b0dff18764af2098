"""Where requests wait until a rank has room for them: by priority, first in first out, each pool for itself. Pure."""

from bisect import insort
from collections.abc import Callable
from itertools import count

from dp_extproc.config.reliability import QueueSettings


class Ticket:
    """A place in the line."""

    __slots__ = ("_number", "pool", "priority", "wake")

    def __init__(self, pool: str, priority: int, number: int, wake: Callable[[], None]) -> None:
        self.pool = pool
        self.priority = priority
        self._number = number
        self.wake = wake
        """Told that there may be room."""

    def __lt__(self, other: "Ticket") -> bool:
        return (-self.priority, self._number) < (-other.priority, other._number)


class AdmissionQueue:
    """Those who wait."""

    def __init__(self, settings: QueueSettings) -> None:
        self.settings = settings
        self._lines: dict[str, list[Ticket]] = {}
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def join(self, pool: str, priority: int, wake: Callable[[], None]) -> Ticket | None:
        """Take a place; None if there are too many already."""
        if self._length >= self.settings.max_depth:
            return None
        ticket = Ticket(pool, priority, next(self._numbers), wake)
        insort(self._lines.setdefault(pool, []), ticket)
        self._length += 1
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the place up, whether it was placed or not; who is first now may try."""
        line = self._lines[ticket.pool]
        was_first = line[0] is ticket
        line.remove(ticket)
        self._length -= 1
        if not line:
            del self._lines[ticket.pool]
        elif was_first:
            line[0].wake()

    def call(self) -> None:
        """Have the first of each pool try: something has ended, or an engine has told its load."""
        for line in self._lines.values():
            line[0].wake()

    def comes_after(self, pool: str, priority: int, ticket: Ticket | None) -> bool:
        """Tell whether a request has to wait for others.

        Args:
            pool: Where it is to go.
            priority: Greater ones go first.
            ticket: Its own place, if it has one.
        """
        line = self._lines.get(pool)
        if not line or line[0] is ticket:
            return False
        return ticket is not None or line[0].priority >= priority
