"""What stand-in engines tell beyond SGLang's pages: who got which request, and whether they kept their pace."""

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
    """What one rank got."""

    requests: int = 0
    tokens: int = 0
    """Of their prompts."""


@dataclass(slots=True)
class Account:
    """What the stand-ins tell of one placement's requests."""

    received: dict[tuple[str, int], Received] = field(default_factory=dict)
    """Per server and rank."""
    stepping: float = 0.0
    """Seconds that the steps of all servers should have taken, before scaling."""
    late: float = 0.0
    """Seconds that they took longer because the machine was too busy, before scaling."""

    @property
    def late_share(self) -> float:
        """Give how much longer steps took than they should have, as a share."""
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
    """Where the servers stood before the requests of a placement came."""

    servers: Mapping[str, tuple[int, float, float]]
    """Per server: number of its last request, seconds of its steps, and those that were late."""

    @classmethod
    async def now(cls, urls: Mapping[str, str]) -> Self | None:
        """Ask every server.

        Returns:
            None when not all of them are stand-ins that tell.
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
            {server: (page.count, seconds, late) for server, (page, seconds, late) in zip(urls, found, strict=True)}
        )

    async def add_since(self, urls: Mapping[str, str], account: Account) -> bool:
        """Add to *account* what has come since.

        Returns:
            False when a server does not tell any more.
        """
        async with _client() as client:
            try:
                found = await asyncio.gather(
                    *(_state(client, url, self.servers[server][0]) for server, url in urls.items())
                )
            except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):
                return False
        for server, (page, seconds, late) in zip(urls, found, strict=True):
            _, seconds_before, late_before = self.servers[server]
            account.stepping += seconds - seconds_before
            account.late += late - late_before
            _add(account.received, server, page.requests)
        return True


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False)


async def _state(client: httpx.AsyncClient, url: str, after: int) -> tuple[_Requests, float, float]:
    requests = (await client.get(f"{url}/debug/requests", params={"after": after})).raise_for_status()
    steps = (await client.get(f"{url}/debug/steps")).raise_for_status()
    groups = msgspec.json.decode(steps.content, type=_Steps).groups
    seconds, late = sum(group.seconds for group in groups), sum(group.late for group in groups)
    return msgspec.json.decode(requests.content, type=_Requests), seconds, late


def _add(received: dict[tuple[str, int], Received], server: str, requests: Sequence[_Request]) -> None:
    for leg in (leg for request in requests for leg in request.legs):
        rank = received.setdefault((server, leg.dp_rank), Received())
        rank.requests += 1
        rank.tokens += leg.prompt_tokens
