"""A request in the admission queue, while its stream is read on."""

import asyncio
from collections.abc import Callable

from dp_extproc.attempt.events import Enqueue, QueueExpired, RoomFreed
from dp_extproc.scheduling.admission import AdmissionQueue, Ticket


class Waiting:
    """The place of one request in the admission queue."""

    __slots__ = ("_is_called", "_loop", "_queue", "_receive", "_ticket", "_timer")

    def __init__(
        self, queue: AdmissionQueue, place: Enqueue, receive: Callable[[RoomFreed | QueueExpired], None]
    ) -> None:
        """Enter the queue.

        Args:
            queue: The admission queue.
            place: Where to enter it.
            receive: Receives the events of the queue, always from the event loop.
        """
        self._queue = queue
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._is_called = False
        self._ticket: Ticket | None = queue.enqueue(place.pool, place.priority, self._wake)
        if self._ticket is None:
            self._timer: asyncio.Handle = self._loop.call_soon(self._expire)
        else:
            self._timer = self._loop.call_later(queue.settings.max_wait, self._expire)

    def leave(self) -> None:
        """Leave the queue; without effect for the second time."""
        self._timer.cancel()
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._queue.remove(ticket)

    def _wake(self) -> None:
        # What has made room is in the middle of its own work.
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._try)

    def _try(self) -> None:
        self._is_called = False
        if self._ticket is not None:
            self._receive(RoomFreed(self._ticket))

    def _expire(self) -> None:
        self._receive(QueueExpired())
