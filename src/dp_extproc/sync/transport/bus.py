"""What carries messages between replicas: nobody waits for it, it may lose messages, and it comes back by itself."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from dp_extproc.background import heed_cancellation

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts to reach the bus. A replica that places blindly should not do so for long."""


class Listener(Protocol):
    """Who is told what comes from a bus."""

    def up(self) -> None:
        """The bus works now. Messages sent before that are lost."""

    def down(self, reason: str) -> None:
        """It does not, or no longer. It is told for every failure; the reason is a sentence without secrets."""

    def receive(self, message: bytes) -> None:
        """Somebody has sent this, perhaps ourselves."""


class Bus(Protocol):
    """Sends to all other replicas."""

    @property
    def lost(self) -> int:
        """Messages of ours that could not be sent."""

    def send(self, message: bytes) -> None:
        """Send when it is possible, else drop it. Never waits."""

    async def run(self, listener: Listener) -> None:
        """Keep the bus alive until cancelled."""


async def keep_up(session: Callable[[], Awaitable[None]], down: Callable[[str], None]) -> None:
    """Run one session after the other, for ever, with pauses that grow while they end soon.

    Args:
        session: Ends by an :exc:`OSError` that says why; :exc:`TimeoutError` and :exc:`ConnectionError` are some.
        down: Is told why.
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
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # replicas that lost it together come back one by one
        pause = min(2 * pause, _LONGEST_PAUSE)
