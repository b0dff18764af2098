"""Finds the endpoints of a role by looking up a name, again and again."""

import asyncio
import importlib.util
import ipaddress
from contextlib import suppress
from functools import partial
from typing import Final

from dp_extproc.config.discovery import DnsRecords, DnsSettings
from dp_extproc.engines.model import SourceKind, in_url
from dp_extproc.fleet.discovery.answers import Address, Answer, LookUpError, Resolver
from dp_extproc.fleet.discovery.look_up_thread import LookUpThread
from dp_extproc.fleet.discovery.source import Member, SourceListener
from dp_extproc.fleet.discovery.system_look_up import look_up_by_system

QUERY_SECONDS: Final = 5.0
"""Limit of one query to all DNS servers, in seconds. ``getaddrinfo`` waits as long for one of them."""
_QUERIES: Final = 2
"""A look-up may take this many queries' time: addresses of two families, or SRV records and their targets."""
INTERVAL: Final = 5.0
"""Seconds between two look-ups without an interval and without a TTL. It is the TTL of CoreDNS in Kubernetes."""
_SHORTEST: Final = 1.0
"""Lower bound of a TTL in seconds: answers of some DNS servers have the TTL 0."""
_LONGEST: Final = 30.0
"""Upper bound of a TTL in seconds: Docker's DNS server gives every name 600, although containers come and go."""
_MOST_MEMBERS: Final = 4096
"""More addresses are no fleet of engines, but a mistake, such as a wildcard name."""


def missing_library(settings: DnsSettings) -> str | None:
    """Explain what has to be installed for these settings; None if everything is there."""
    if _has_dnspython() or not _needs_dnspython(settings):
        return None
    key = "type: srv" if settings.type is DnsRecords.SRV else "nameserver"
    return f"{key} needs the library dnspython; install it: pip install dnspython"


def make_resolver(settings: DnsSettings, seconds: float = QUERY_SECONDS) -> Resolver:
    """Choose who looks up the name: the DNS servers if dnspython is installed, else the system."""
    with suppress(ValueError):
        return _Literal(str(ipaddress.ip_address(settings.name)), settings.port or 0)
    if not _has_dnspython() and not _needs_dnspython(settings):
        return LookUpThread(settings.name, partial(look_up_by_system, settings.name, settings.port or 0))

    def look_up() -> Answer:
        # dnspython takes a tenth of a second to import, and belongs to an extra.
        from dp_extproc.fleet.discovery.dns_look_up import look_up_by_dns  # noqa: PLC0415

        return look_up_by_dns(settings, seconds)

    return LookUpThread(settings.name, look_up)


class DnsSource:
    """All addresses of a name: a :class:`dp_extproc.fleet.discovery.source.Source`."""

    kind = SourceKind.DNS

    def __init__(self, settings: DnsSettings, resolver: Resolver | None = None, seconds: float = QUERY_SECONDS) -> None:
        """Set up; nothing is looked up before :meth:`run`. *seconds* is the limit of one query."""
        self._settings = settings
        self._resolver = make_resolver(settings, seconds) if resolver is None else resolver
        self._seconds = _QUERIES * seconds

    @property
    def keep_for(self) -> float:
        return self._settings.keep_for

    def __str__(self) -> str:
        return f"dns {self._settings.name}"

    async def run(self, listener: SourceListener) -> None:
        """Look up until cancelled."""
        while True:
            ttl = None
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await self._resolver.look_up()
                listener.snapshot(_members(answer, self._settings.group))
                ttl = answer.ttl
            except LookUpError as error:
                listener.failed(str(error))
            except TimeoutError:
                listener.failed(f"{self._settings.name} was not resolved within {self._seconds:g} s")
            await asyncio.sleep(pause_after(ttl, self._settings.interval))


def pause_after(ttl: float | None, interval: float | None) -> float:
    """Compute the seconds until the next look-up."""
    if interval is not None:
        return interval
    return INTERVAL if ttl is None else min(max(ttl, _SHORTEST), _LONGEST)


def _members(answer: Answer, group: str | None) -> tuple[Member, ...]:
    """List each address and port once, in an order that does not depend on the order of the records."""
    members = {(each.host, each.port): _member(each, group) for each in sorted(answer.addresses)}
    if len(members) > _MOST_MEMBERS:
        raise LookUpError(f"the answer has {len(members)} addresses, and more than {_MOST_MEMBERS} are not accepted")
    return tuple(members.values())


def _member(address: Address, group: str | None) -> Member:
    url = f"http://{in_url(address.host)}:{address.port}"
    return Member(url=url, host=address.host, port=address.port, name=address.name, group=group)


def _needs_dnspython(settings: DnsSettings) -> bool:
    return settings.type is DnsRecords.SRV or settings.nameserver is not None


def _has_dnspython() -> bool:
    return importlib.util.find_spec("dns") is not None


class _Literal:
    """An address in place of a name."""

    def __init__(self, host: str, port: int) -> None:
        self._answer = Answer((Address(host, port),))

    async def look_up(self) -> Answer:
        return self._answer
