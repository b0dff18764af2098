"""Watches the load of every rank while requests run, by the engines' own account."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from dp_extproc.engines.sglang.load_pages import read_loads

_INTERVAL: Final = 0.1
_PATIENCE: Final = 2.0
"""Seconds for one look. A page takes milliseconds; a longer wait would only leave more of the run unseen."""


@dataclass(slots=True)
class LoadProbe:
    """Sums over all looks so far."""

    looks: dict[str, int] = field(default_factory=dict)
    """Per server: how often its page was read."""
    failed: dict[str, int] = field(default_factory=dict)
    """Per server: how often it could not be read."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Per server: why not, the last time."""
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    """Per server and rank: tokens held or queued there, summed over all looks."""
    fullest: dict[str, int] = field(default_factory=dict)
    """Per server: tokens of its fullest rank at each look, summed."""

    def note(self, server: str, tokens: Mapping[int, int]) -> None:
        """Take in one look at one server: the tokens of each rank."""
        self.looks[server] = self.looks.get(server, 0) + 1
        for rank, count in tokens.items():
            self.tokens[server, rank] = self.tokens.get((server, rank), 0) + count
        self.fullest[server] = self.fullest.get(server, 0) + max(tokens.values(), default=0)

    def note_failure(self, server: str, reason: str) -> None:
        """Take in a look at one server that failed."""
        self.failed[server] = self.failed.get(server, 0) + 1
        self.reasons[server] = reason

    def mean_tokens(self, server: str, rank: int) -> float | None:
        """Give the average load of a rank; None when it was never seen."""
        total = self.tokens.get((server, rank))
        return None if total is None else total / self.looks[server]

    def failed_share(self, server: str) -> float:
        """Give the share of the looks at a server that failed; 1 when there was none at all."""
        failed = self.failed.get(server, 0)
        looks = self.looks.get(server, 0) + failed
        return failed / looks if looks else 1.0

    def imbalance(self, servers: Sequence[str]) -> float | None:
        """Give how full the fullest rank of a server was at any moment, against the average rank then.

        Returns:
            1.0 when all ranks always had the same; None when none of these servers had anything.
        """
        fullest = sum(self.fullest.get(server, 0) for server in servers)
        ranks = [[count for (name, _), count in self.tokens.items() if name == server] for server in servers]
        average = sum(sum(counts) / len(counts) for counts in ranks if counts)
        return fullest / average if average else None


@contextlib.asynccontextmanager
async def watch(urls: Mapping[str, str], probe: LoadProbe) -> AsyncIterator[None]:
    """Look at every server ten times a second, and note it. A look that fails is counted.

    Args:
        urls: By the server's name.
        probe: Where to note.
    """
    async with httpx.AsyncClient(timeout=_PATIENCE, trust_env=False) as client:
        looking = [asyncio.create_task(_look_on(client, name, url, probe)) for name, url in urls.items()]
        try:
            yield
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)


async def _look_on(client: httpx.AsyncClient, server: str, url: str, probe: LoadProbe) -> None:
    while True:
        try:
            # Bytes that trickle in for ever would pass httpx's own timeouts, which are per read.
            async with asyncio.timeout(_PATIENCE):
                page = (await client.get(f"{url}/v1/loads")).raise_for_status().content
            ranks = read_loads(page).ranks
        except TimeoutError:
            probe.note_failure(server, f"/v1/loads has not answered within {_PATIENCE:.0f} s")
        except httpx.HTTPStatusError as error:
            probe.note_failure(server, f"/v1/loads answers {error.response.status_code}")
        except Exception as error:  # noqa: BLE001 - whatever a server answers, the next look may succeed
            probe.note_failure(server, f"{type(error).__name__}: {error}")
        else:
            if ranks:
                probe.note(server, {rank.dp_rank: rank.tokens for rank in ranks})
            else:
                probe.note_failure(server, "/v1/loads tells of no rank")
        await asyncio.sleep(_INTERVAL)
