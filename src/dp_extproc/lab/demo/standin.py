"""Read what stand-in engines report beyond SGLang's pages: the requests of each rank, and whether steps were late."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import httpx
import msgspec
from msgspec import Struct

_TIMEOUT: Final = 30.0
"""Seconds. A journal of thousands of requests takes a second or two to write and to read."""


@dataclass(slots=True)
class Received:
    """The requests that one rank got."""

    requests: int = 0
    tokens: int = 0
    """Tokens of their prompts."""


@dataclass(slots=True)
class Account:
    """What the stand-ins report about the requests of one placement."""

    received: dict[tuple[str, int], Received] = field(default_factory=dict)
    """Per engine and rank."""
    stepping: float = 0.0
    """Seconds that the steps of all engines should have taken, before scaling."""
    late: float = 0.0
    """Seconds that steps took longer because the machine was too busy, before scaling."""

    @property
    def late_share(self) -> float:
        """Return how much longer steps took than they should have, as a share."""
        return self.late / self.stepping if self.stepping else 0.0


class _Leg(Struct):
    dp_rank: int
    prompt_tokens: int


class _Request(Struct):
    number: int
    legs: list[_Leg]


class _Requests(Struct):
    count: int
    requests: list[_Request]


class _Group(Struct):
    seconds: float
    late: float


class _Steps(Struct):
    groups: list[_Group]


@dataclass(frozen=True, slots=True)
class Mark:
    """The counters of the engines before the requests of a placement."""

    engines: Mapping[str, tuple[int, float, float]]
    """Per engine: number of its last request, seconds of its steps, and seconds that they were late."""

    @classmethod
    async def now(cls, urls: Mapping[str, str]) -> Self | None:
        """Read the counters of every engine.

        Returns:
            None when not all of them are stand-ins with these pages.
        """
        if not urls:
            return None
        async with _client() as client:
            try:
                # No request has so high a number: the count comes without the requests.
                found = await asyncio.gather(*(_state(client, url, 10**18 - 1) for url in urls.values()))
            except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):
                return None
        return cls(
            {engine: (page.count, seconds, late) for engine, (page, seconds, late) in zip(urls, found, strict=True)}
        )

    async def add_since(self, urls: Mapping[str, str], account: Account) -> bool:
        """Add the difference since the mark to *account*.

        Returns:
            False when an engine has no such page any more.
        """
        async with _client() as client:
            try:
                found = await asyncio.gather(
                    *(_state(client, url, self.engines[engine][0]) for engine, url in urls.items())
                )
            except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):
                return False
        for engine, (page, seconds, late) in zip(urls, found, strict=True):
            _, seconds_before, late_before = self.engines[engine]
            account.stepping += seconds - seconds_before
            account.late += late - late_before
            _add(account.received, engine, page.requests)
        return True


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False)


async def _state(client: httpx.AsyncClient, url: str, after: int) -> tuple[_Requests, float, float]:
    requests = (await client.get(f"{url}/debug/requests", params={"after": after})).raise_for_status()
    steps = (await client.get(f"{url}/debug/steps")).raise_for_status()
    groups = msgspec.json.decode(steps.content, type=_Steps).groups
    seconds, late = sum(group.seconds for group in groups), sum(group.late for group in groups)
    return msgspec.json.decode(requests.content, type=_Requests), seconds, late


def _add(received: dict[tuple[str, int], Received], engine: str, requests: Sequence[_Request]) -> None:
    for leg in (leg for request in requests for leg in request.legs):
        rank = received.setdefault((engine, leg.dp_rank), Received())
        rank.requests += 1
        rank.tokens += leg.prompt_tokens
