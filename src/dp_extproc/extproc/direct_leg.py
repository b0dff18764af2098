"""Sends prefill legs, and what ends a decode leg, with the HTTP client of the service."""

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import product
from typing import Final

import msgspec

from dp_extproc.attempt.events import LegEvent, SendLeg
from dp_extproc.legs.client import LegClient, SentLeg
from dp_extproc.legs.listener import LegListener, LegOutcome, NoLegListener
from dp_extproc.legs.request import LegRequest
from dp_extproc.scheduling.decision import LegAbort

ABORT_PATH: Final = "/abort_request"
"""Path at which SGLang ends a request by its id. The response is empty, whether the id is known or not."""
_ABORT_PAUSES: Final = (0.0, 1.0)
"""Seconds before each try of an abort. There are two, because the first may overtake the request that it ends."""
_PAUSES_BEFORE_CLOSE: Final = (0.0, 0.1)
"""The same for an abort that precedes the close of the leg: it delays the reply to the client."""
_CLOSE_WAITS_SECONDS: Final = 0.5
"""Most seconds for which a reply waits for such an abort. An engine in good health takes some milliseconds."""
_MOST_ABORTS: Final = 1_000
"""Most aborts at a time. Beyond that they are dropped, and their requests run to their end."""
_MOST_OF_BATCH: Final = 64
"""Most aborts of one batch at a time, each with a connection. A batch may have thousands of ids."""
_ABORT_SECONDS: Final = 5.0
"""Seconds until the response to an abort has to be here."""
_SLACK_SECONDS: Final = 5.0
"""Seconds beyond the timeout of prefill after which the client gives a leg up. The attempt does so before."""
_JSON: Final = ("content-type", b"application/json")


class DirectLegs:
    """Sends the prefill legs of one process, and remembers which are in flight."""

    def __init__(
        self,
        prefill_timeout: float,
        *,
        tls: ssl.SSLContext | None = None,
        listener: LegListener | None = None,
        abort_listener: LegListener | None = None,
    ) -> None:
        """Set up, in the event loop; *prefill_timeout* is in seconds, the longest of any leg.

        *tls* is for all connections to engines; without it they are plain HTTP. The listeners are informed of every
        leg, and of every abort of a decode leg.
        """
        self._timeout = prefill_timeout + _SLACK_SECONDS
        self._tls = tls
        self._client = LegClient(listener)
        self._aborts = LegClient(abort_listener)
        self._abort_listener = abort_listener or NoLegListener()
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each decode leg that is being ended."""

    def __len__(self) -> int:
        """Return the number of legs and of aborts that have not ended."""
        return len(self._client) + len(self._tasks)

    def send(self, command: SendLeg, report: Callable[[LegEvent], object]) -> SentLeg:
        """Send a leg. Its events are reported later, the last of them when it has ended."""
        leg = command.request
        own = dict(leg.headers)
        passed = tuple(each for each in command.headers if each[0] not in own)
        headers = (_JSON, *passed, *leg.headers)
        request = LegRequest(leg.address, command.path, headers, leg.preamble, leg.tail, self._timeout, tls=self._tls)
        return self._client.send(request, report)

    def abort(self, command: LegAbort) -> Callable[[], Awaitable[object]] | None:
        """End a decode leg at its engine, without waiting for the result.

        Returns:
            What a reply that closes the leg has to wait for; None if there is nothing.
        """
        if max(len(self._tasks), len(self._aborts)) >= _MOST_ABORTS:
            self._abort_listener.leg_ended(LegOutcome.DROPPED, 0.0)
            return None
        task = asyncio.get_running_loop().create_task(self._abort(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return partial(asyncio.wait, [task], timeout=_CLOSE_WAITS_SECONDS) if command.precedes_close else None

    async def _abort(self, command: LegAbort) -> None:
        headers = (_JSON, *command.headers)
        bodies = [msgspec.json.encode({"rid": request_id}) for request_id in command.request_ids]
        sent: deque[SentLeg] = deque()
        for pause in _PAUSES_BEFORE_CLOSE if command.precedes_close else _ABORT_PAUSES:
            await asyncio.sleep(pause)
            for address, body in product(command.addresses, bodies):
                if len(sent) >= _MOST_OF_BATCH:
                    await sent.popleft().closed()
                request = LegRequest(address, ABORT_PATH, headers, body, b"", _ABORT_SECONDS, tls=self._tls)
                sent.append(self._aborts.send(request, _ignore))
        await asyncio.gather(*(each.closed() for each in sent))

    async def all_ended(self) -> None:
        """Wait until no leg is in flight, and no abort is to be sent any more."""
        while len(self):
            await asyncio.gather(*(leg.closed() for leg in self._client))
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel all legs and aborts, and close all connections."""
        await self._client.close()
        for task in self._tasks:
            task.cancel()
        await self._aborts.close()


def _ignore(event: LegEvent) -> None:
    """Ignore what follows from an abort: the decode leg itself reports its end."""
