"""The bus between replicas: sending never waits, messages may be lost, and a lost bus is restored by itself."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from dp_extproc.background import heed_cancellation

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts to reach the bus. Meanwhile a replica schedules without the load of its peers."""


class Listener(Protocol):
    """What a bus calls."""

    def up(self) -> None:
        """Note that the bus works now. Messages that were sent before are lost."""

    def down(self, reason: str) -> None:
        """Note a failure of the bus; called for every one. The reason is a sentence without secrets."""

    def receive(self, data: bytes) -> None:
        """Take a message of any replica, this one included."""


class Bus(Protocol):
    """Sends messages to all other replicas."""

    @property
    def lost(self) -> int:
        """Messages of this replica that could not be sent, in all."""

    @property
    def problem(self) -> str | None:
        """Why some replicas do not get messages although the bus is connected; None if all of them do."""

    def send(self, message: bytes) -> None:
        """Send a message if possible, else drop it, without waiting."""

    async def run(self, listener: Listener) -> None:
        """Keep the bus connected until cancelled."""


async def keep_up(session: Callable[[], Awaitable[None]], down: Callable[[str], None]) -> None:
    """Run one session after the other, with pauses that grow while sessions end within two seconds. Never returns.

    Args:
        session: Raises an :exc:`OSError` with the reason for its end; :exc:`TimeoutError` is one, too.
        down: Called with that reason.
    """
    loop = asyncio.get_running_loop()
    pause = _FIRST_PAUSE
    while True:
        begun = loop.time()
        try:
            await session()
        except OSError as error:
            heed_cancellation()
            down(str(error) or type(error).__name__)
        if loop.time() - begun > _LONGEST_PAUSE:
            pause = _FIRST_PAUSE
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # replicas that lost it together connect one by one
        pause = min(2 * pause, _LONGEST_PAUSE)
