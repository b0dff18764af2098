"""Sample the load of every rank while requests run, from the pages of the engines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from dp_extproc.engines.sglang.load_pages import read_loads

_INTERVAL: Final = 0.1
_SAMPLE_SECONDS: Final = 2.0
"""Seconds for one sample. A page takes milliseconds; waiting longer would only leave more of the run unsampled."""


@dataclass(slots=True)
class LoadProbe:
    """Sums over all samples so far."""

    samples: dict[str, int] = field(default_factory=dict)
    """Per engine: how often its page was read."""
    failed: dict[str, int] = field(default_factory=dict)
    """Per engine: how often it could not be read."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Per engine: the reason of the last failure."""
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    """Per engine and rank: tokens held or queued there, summed over all samples."""
    fullest: dict[str, int] = field(default_factory=dict)
    """Per engine: tokens of its fullest rank in each sample, summed."""

    def note(self, engine: str, tokens: Mapping[int, int]) -> None:
        """Add one sample of one engine: the tokens of each rank."""
        self.samples[engine] = self.samples.get(engine, 0) + 1
        for rank, count in tokens.items():
            self.tokens[engine, rank] = self.tokens.get((engine, rank), 0) + count
        self.fullest[engine] = self.fullest.get(engine, 0) + max(tokens.values(), default=0)

    def note_failure(self, engine: str, reason: str) -> None:
        """Count a sample of one engine that failed."""
        self.failed[engine] = self.failed.get(engine, 0) + 1
        self.reasons[engine] = reason

    def mean_tokens(self, engine: str, rank: int) -> float | None:
        """Return the average load of a rank; None when it was never sampled."""
        total = self.tokens.get((engine, rank))
        return None if total is None else total / self.samples[engine]

    def failed_share(self, engine: str) -> float:
        """Return the share of the samples of an engine that failed; 1 when there was none at all."""
        failed = self.failed.get(engine, 0)
        samples = self.samples.get(engine, 0) + failed
        return failed / samples if samples else 1.0

    def imbalance(self, engines: Sequence[str]) -> float | None:
        """Return the tokens of the fullest rank of an engine at any moment, as a multiple of the average rank.

        Returns:
            1.0 when all ranks always had the same; None when none of these engines had any tokens.
        """
        fullest = sum(self.fullest.get(engine, 0) for engine in engines)
        ranks = [[count for (name, _), count in self.tokens.items() if name == engine] for engine in engines]
        average = sum(sum(counts) / len(counts) for counts in ranks if counts)
        return fullest / average if average else None


@contextlib.asynccontextmanager
async def watch(urls: Mapping[str, str], probe: LoadProbe) -> AsyncIterator[None]:
    """Sample every engine ten times a second. A sample that fails is counted.

    Args:
        urls: URLs by the engine's name.
        probe: Receives the samples.
    """
    async with httpx.AsyncClient(timeout=_SAMPLE_SECONDS, trust_env=False) as client:
        looking = [asyncio.create_task(_sample(client, name, url, probe)) for name, url in urls.items()]
        try:
            yield
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)


async def _sample(client: httpx.AsyncClient, engine: str, url: str, probe: LoadProbe) -> None:
    while True:
        try:
            # Bytes that trickle in for ever would pass httpx's own timeouts, which are per read.
            async with asyncio.timeout(_SAMPLE_SECONDS):
                page = (await client.get(f"{url}/v1/loads")).raise_for_status().content
            ranks = read_loads(page).ranks
        except TimeoutError:
            probe.note_failure(engine, f"/v1/loads has not answered within {_SAMPLE_SECONDS:.0f} s")
        except httpx.HTTPStatusError as error:
            probe.note_failure(engine, f"/v1/loads answers {error.response.status_code}")
        except Exception as error:  # noqa: BLE001 - whatever an engine answers, the next sample may succeed
            probe.note_failure(engine, f"{type(error).__name__}: {error}")
        else:
            if ranks:
                probe.note(engine, {rank.dp_rank: rank.tokens for rank in ranks})
            else:
                probe.note_failure(engine, "/v1/loads has no rank")
        await asyncio.sleep(_INTERVAL)
