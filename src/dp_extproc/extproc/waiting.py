"""The wait of one request for room, while its main stream is read on."""

import asyncio
from collections.abc import Callable

from dp_extproc.attempt.events import Enqueue, QueueExpired, RoomFreed
from dp_extproc.scheduling.admission import AdmissionQueue, Ticket


class Waiting:
    """Reports the events of the admission queue to the attempt of one request, until it leaves the queue."""

    __slots__ = ("_is_woken", "_loop", "_queue", "_receive", "_ticket", "_timer")

    def __init__(
        self, queue: AdmissionQueue, place: Enqueue, receive: Callable[[RoomFreed | QueueExpired], None]
    ) -> None:
        """Enter the queue.

        Args:
            queue: The admission queue.
            place: Where to enter it.
            receive: Receives the events of the queue, never within the call that makes room.
        """
        self._queue = queue
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._is_woken = False
        self._ticket: Ticket | None = queue.enqueue(place.pool, place.priority, self._wake, place.work)
        if self._ticket is None:  # the queue is full
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
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._try)

    def _try(self) -> None:
        self._is_woken = False
        if self._ticket is not None:
            self._receive(RoomFreed(self._ticket))

    def _expire(self) -> None:
        self._receive(QueueExpired())
