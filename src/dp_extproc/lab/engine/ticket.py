"""Track a leg, for its HTTP handler and for the scheduler's loop."""

import asyncio
import time
from dataclasses import dataclass, field

from dp_extproc.lab.engine.leg import Failure, Finished, Leg
from dp_extproc.lab.engine.scheduler.work import Role, Work
from dp_extproc.lab.engine.text import output_id


@dataclass(slots=True, eq=False)
class Ticket:
    """A leg that a rank has accepted. The scheduler side writes, the HTTP side reads and waits."""

    leg: Leg
    work: Work
    streaming: bool = False
    received_at: float = field(default_factory=time.time)
    queued_at: float = 0.0
    """Moment since which it waits for nothing but a step."""
    first_token_at: float | None = None
    ended_at: float | None = None
    tokens: list[int] = field(default_factory=list)
    end: Finished | Failure | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    """The task in which decode reaches prefill."""
    prefill_dp_rank: int = 0
    """On decode: the rank that its KV cache comes from."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Start to wait at once; a leg that waits for the other side first sets a later moment."""
        self.queued_at = self.received_at

    def first_token_reported_at(self, role: Role) -> float | None:
        """Return when the HTTP process got the first token: decode reports what is not streamed at the end."""
        return self.ended_at if role is Role.DECODE and not self.streaming else self.first_token_at

    def give(self, position: int) -> None:
        """Add the output token at *position*."""
        self.tokens.append(output_id(self.leg.prompt_tokens, position))
        self.first_token_at = self.first_token_at or time.time()
        self._changed.set()

    def finish(self, end: Finished | Failure) -> None:
        """End it; only the first end counts. Stops what waits for the other side."""
        if self.end is not None:
            return
        self.end, self.ended_at = end, time.time()
        self.stop_waiting()
        self._changed.set()
        self._ended.set()

    def stop_waiting(self) -> None:
        """Stop waiting for the other engine."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        self.task = None

    async def wait(self, known: int, seconds: float | None = None) -> bool:
        """Wait for more than *known* tokens or the end.

        Returns:
            Whether there is something new; False when *seconds* have passed.
        """
        while len(self.tokens) <= known and self.end is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
            except TimeoutError:
                return False
        return True

    async def wait_for_end(self, seconds: float) -> bool:
        """Wait for the end.

        Returns:
            Whether it has come; False when *seconds* have passed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True
