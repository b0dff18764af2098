"""Watches the load of every rank while requests run, by the engines' own account."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from dp_extproc.fleet.loads_page import read_loads

_INTERVAL: Final = 0.1


@dataclass(slots=True)
class LoadProbe:
    """Sums over all looks so far."""

    looks: int = 0
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    """Per server and rank: tokens held or queued there, summed over all looks."""
    fullest: dict[str, int] = field(default_factory=dict)
    """Per server: tokens of its fullest rank at each look, summed."""

    def note(self, server: str, tokens: Sequence[int]) -> None:
        """Take in one look at one server."""
        for rank, count in enumerate(tokens):
            self.tokens[server, rank] = self.tokens.get((server, rank), 0) + count
        self.fullest[server] = self.fullest.get(server, 0) + max(tokens)

    def mean_tokens(self, server: str, rank: int) -> float:
        """Give the average load of a rank."""
        return self.tokens.get((server, rank), 0) / max(1, self.looks)

    def imbalance(self, servers: Sequence[str]) -> float:
        """Give how full the fullest rank of a server was at any moment, against the average rank then."""
        fullest = sum(self.fullest[server] for server in servers)
        ranks = {server: [count for (name, _), count in self.tokens.items() if name == server] for server in servers}
        average = sum(sum(counts) / len(counts) for counts in ranks.values())
        return fullest / average if average else 1.0


@contextlib.asynccontextmanager
async def watch(urls: Mapping[str, str]) -> AsyncIterator[LoadProbe]:
    """Look at every server ten times a second.

    Args:
        urls: By the server's name.
    """
    probe = LoadProbe()

    async def look_on() -> None:
        async with httpx.AsyncClient(timeout=10) as client:
            while True:
                pages = await asyncio.gather(*(client.get(f"{url}/v1/loads") for url in urls.values()))
                probe.looks += 1
                for server, page in zip(urls, pages, strict=True):
                    ranks = read_loads(page.content).ranks
                    probe.note(server, [rank.tokens for rank in ranks])
                await asyncio.sleep(_INTERVAL)

    looking = asyncio.create_task(look_on())
    try:
        yield probe
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
