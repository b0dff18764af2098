"""Looks up a name at DNS servers, and so gets SRV records and TTLs. It needs dnspython (the extra ``dns``).

The queries of a look-up run in an event loop of their own: to parse the answer with a thousand addresses takes 25 ms.
Addresses in ``/etc/hosts`` have precedence, as usual. Other databases of the name service switch are not read. A
truncated answer is never used: the query is sent again over TCP.
"""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import dns.asyncresolver
import dns.name
import dns.resolver
from dns.exception import DNSException
from dns.rdatatype import AAAA, SRV, A, RdataType

from dp_extproc.config.discovery import DnsSettings
from dp_extproc.fleet.discovery.answers import Address, Answer

_LOCAL_NAMES: Final = Path("/etc/hosts")
_AT_A_TIME: Final = 16
"""Queries for the targets of SRV records that run at the same time, so that a DNS server is not flooded."""
_FAMILIES: Final = (A, AAAA)
"""Of two families each engine would be there twice, so the first that has addresses is taken."""

_Addresses = tuple[list[str], float | None]
"""Addresses, and the seconds for which they are valid."""


def look_up_by_dns(settings: DnsSettings, seconds: float, local_names: Path = _LOCAL_NAMES) -> Answer:
    """Look up the addresses or the SRV records of a name.

    It blocks, and raises OSError or an exception of dnspython. *seconds* is the limit of one query, all DNS servers and
    tries included.
    """
    asks_system = settings.nameserver is None
    if asks_system and settings.port is not None and (listed := _listed(local_names, settings.name)):
        return Answer(tuple(Address(each, settings.port) for each in listed))
    return asyncio.run(_Query(_resolver(settings), seconds, use_search=asks_system).look_up(settings))


def _resolver(settings: DnsSettings) -> dns.asyncresolver.Resolver:
    """Read ``/etc/resolv.conf`` each time, because it may change."""
    if settings.nameserver is None:
        return dns.asyncresolver.Resolver()
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [settings.nameserver.host]
    resolver.port = settings.nameserver.port
    return resolver


def _listed(local_names: Path, name: str) -> list[str]:
    """Find the addresses of a name in ``/etc/hosts``."""
    text = ""
    with suppress(OSError):
        text = local_names.read_text(encoding="utf-8", errors="replace")
    name = name.removesuffix(".").lower()
    entries = [line.partition("#")[0].lower().split() for line in text.splitlines()]
    found = [entry[0] for entry in entries if name in entry[1:]]
    return [each for each in found if ":" not in each] or found


class _Query:
    """One look-up, with all the queries that it takes."""

    def __init__(self, resolver: dns.asyncresolver.Resolver, seconds: float, *, use_search: bool) -> None:
        self._resolver = resolver
        self._seconds = seconds
        self._use_search = use_search
        self._free = asyncio.Semaphore(_AT_A_TIME)

    async def look_up(self, settings: DnsSettings) -> Answer:
        """Look up the name in search domains and as it is."""
        try:
            return await self._records(settings, settings.name)
        except (TimeoutError, DNSException):
            # As for getaddrinfo, a search domain whose DNS server is away must not hide the name itself.
            if not self._use_search or settings.name.endswith("."):
                raise
            answer = await self._records(settings, f"{settings.name}.")
            if not answer.addresses:
                raise
            return answer

    async def _records(self, settings: DnsSettings, name: str) -> Answer:
        if settings.port is None:
            return await self._services(name)
        found, ttl = await self._addresses(name)
        return Answer(tuple(Address(each, settings.port) for each in found), ttl)

    async def _addresses(self, name: str) -> _Addresses:
        for family in _FAMILIES:
            answer = await self._ask(name, family)
            if answer is None:
                break
            if answer.rrset is not None:
                return [record.address for record in answer.rrset], answer.chaining_result.minimum_ttl
        return [], None

    async def _services(self, name: str) -> Answer:
        """Give the addresses of the targets of SRV records. Their priorities and weights are not used."""
        answer = await self._ask(name, SRV)
        if answer is None or answer.rrset is None:
            return Answer()
        records = [record for record in answer.rrset if record.target != dns.name.root]  # which stands for "none"
        targets = sorted({record.target for record in records})  # so that always the same failure is reported
        given = {(each.name, each.rdtype): each for each in answer.response.additional}
        looked_up = await asyncio.gather(*(self._target(each, given) for each in targets), return_exceptions=True)
        found = dict(zip(targets, _without_failures(looked_up), strict=True))
        ttls = [answer.chaining_result.minimum_ttl, *(ttl for _, ttl in found.values() if ttl is not None)]
        return Answer(
            tuple(
                Address(each, record.port, record.target.to_text(omit_final_dot=True))
                for record in records
                for each in found[record.target][0]
            ),
            min(ttls),
        )

    async def _target(self, name: Any, given: dict[Any, Any]) -> _Addresses:
        """Take the addresses from the additional records of the answer, or look them up."""
        for family in _FAMILIES:
            if (records := given.get((name, family))) is not None:
                return [record.address for record in records], records.ttl
        async with self._free:
            return await self._addresses(name.to_text())

    async def _ask(self, name: str, kind: RdataType) -> dns.resolver.Answer | None:
        """Send a query until a DNS server has answered. Returns None if there is no such name."""
        try:
            return await self._resolver.resolve(
                name, kind, raise_on_no_answer=False, search=self._use_search, lifetime=self._seconds
            )
        except dns.resolver.NXDOMAIN:
            return None
        except dns.resolver.LifetimeTimeout as error:
            tried = ", ".join(dict.fromkeys(str(name) for name, *_ in error.kwargs["errors"])) or "the DNS servers"
            raise TimeoutError(f"no answer of {tried} within {self._seconds:g} s") from None


def _without_failures(looked_up: Iterable[_Addresses | BaseException]) -> Iterable[_Addresses]:
    for each in looked_up:
        if isinstance(each, BaseException):
            raise each
        yield each
