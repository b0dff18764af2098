"""Replies are written in the order in which the attempt made them, whichever coroutine writes them."""

import asyncio
from collections.abc import Sequence
from itertools import combinations, count, product
from typing import Any

import pytest

from dp_extproc.attempt.events import Command, Immediate, Phase, StreamedChunk
from dp_extproc.extproc.streams import Streams, Writer

EACH = 3
"""Messages of each of the two streams of an attempt."""
ORDERS = list(combinations(range(2 * EACH), EACH))
"""Which of all messages are those of the main stream."""


class Context:
    """A gRPC stream whose writes take some rounds of the event loop."""

    def __init__(self, rounds: Sequence[int]) -> None:
        self._rounds = iter(rounds)
        self._is_writing = False
        self.written: list[bytes] = []

    async def write(self, message: bytes) -> None:
        assert not self._is_writing, "gRPC allows no two writes at once"
        self._is_writing = True
        for _ in range(next(self._rounds, 0)):
            await asyncio.sleep(0)
        self.written.append(message)
        self._is_writing = False


async def run(order: Sequence[int], rounds: Sequence[int], last: Command | None = None) -> list[bytes]:
    """Have two streams receive messages in an order; each has one reply on the main stream.

    The next message is received while the replies to the ones before are still being written.
    """
    context, numbers = Context(rounds), count()
    attempt: Any = None
    streams = Streams(attempt, Writer(context))
    leg = Writer(Context(()))
    turns = [asyncio.Event() for _ in range(2 * EACH + 1)]
    turns[0].set()

    async def receive(own: Writer, turn: int) -> None:
        await turns[turn].wait()
        number = next(numbers)
        is_last = last is not None and number == EACH
        reply = last if is_last and last is not None else StreamedChunk(Phase.RESPONSE_BODY, b"%d" % number, False)
        turns[turn + 1].set()
        await streams.carry_out([reply], own)

    async def read(own: Writer, mine: Sequence[int]) -> None:
        for turn in mine:
            await receive(own, turn)

    others = [turn for turn in range(2 * EACH) if turn not in order]
    await asyncio.gather(read(streams.main, order), read(leg, others))
    for _ in range(sum(rounds) + 2 * EACH):  # as long as what was left to tasks can take
        await asyncio.sleep(0)
    return context.written


@pytest.mark.parametrize("rounds", list(product((0, 1, 3), repeat=3)), ids=str)
def test_replies_keep_the_order_of_the_attempt_at_every_interleaving(rounds: tuple[int, ...]) -> None:
    """A reply that another coroutine causes is neither overtaken, nor does it overtake."""

    async def story() -> None:
        for order in ORDERS:
            written = await run(order, (*rounds, *rounds))
            assert [int(chunk[-1:]) for chunk in written] == list(range(2 * EACH)), order

    asyncio.run(story())


def test_nothing_follows_an_immediate_response() -> None:
    """Replies that were put behind it are dropped."""
    immediate = Immediate(503, b"", (), "cancelled")

    async def story() -> None:
        for order in ORDERS:
            assert len(await run(order, (1, 0, 2, 0), immediate)) == EACH + 1, order

    asyncio.run(story())
