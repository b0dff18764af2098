"""Reads every engine once, as the monitor does, and reports on each. Used by ``dp-extproc check``."""

import asyncio
import ipaddress
import ssl
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from dp_extproc.config.load import LoadSettings, LoadSource
from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.compatibility import GROUP, KindPair, PairingKey, compare_kinds, difference, pairing_key
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineFailure, FailureKind, internal_failure
from dp_extproc.engines.model import MODE_OF, Diagnostic, Endpoint, EngineFacts, LoadPage, Role, in_url
from dp_extproc.engines.sglang.server_info import DEFAULT_BOOTSTRAP_PORT
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.fleet.sources.polling import EnginePoller

_CONNECT_SECONDS: Final = 2.0
_OLD_SECONDS: Final = 30.0
"""Age of the newest load on a page from which on it is a problem: idle schedulers publish it every second or two."""
_IS_ALONE: Final = "; no server of the pool is left that it can be paired with"


@dataclass(frozen=True, slots=True)
class EngineReport:
    """The result for one endpoint."""

    endpoint: Endpoint
    facts: EngineFacts | None
    source: LoadSource | None
    """The page of its load; None if there is none."""
    failure: EngineFailure | None
    diagnostics: tuple[Diagnostic, ...]

    @property
    def is_usable(self) -> bool:
        """Whether the service can send requests to it, and reads its load."""
        if self.facts is None or any(each.unusable for each in self.diagnostics):
            return False
        return self.failure is None or self.failure.kind is FailureKind.DISAGREEMENT

    @property
    def state(self) -> str:
        """The result in one word."""
        if self.failure is not None:
            return self.failure.kind.value
        return "ok" if self.is_usable else "unusable"

    @property
    def bootstrap(self) -> tuple[str, int] | None:
        """Where decode engines find this prefill engine; None for other roles."""
        if self.endpoint.role is not Role.PREFILL:
            return None
        reported = self.facts.bootstrap_port if self.facts else None
        port = self.endpoint.bootstrap_port or reported or DEFAULT_BOOTSTRAP_PORT
        return self.endpoint.bootstrap_host or self.endpoint.host, port


async def check_engines(
    endpoints: Iterable[Endpoint],
    settings: LoadSettings,
    credentials: Credentials = NO_CREDENTIALS,
    tls: ssl.SSLContext | None = None,
) -> list[EngineReport]:
    """Read every endpoint, all at the same time. The reports are in the order of the endpoints."""
    every = tuple(endpoints)
    async with AsyncExitStack() as clients:
        engines = [
            EngineClient(each, settings, await clients.enter_async_context(make_client(tls)), credentials)
            for each in every
        ]
        reports = await asyncio.gather(*(_check(engine, every, settings) for engine in engines))
    return [replace(each, diagnostics=(*each.diagnostics, *_pair_diagnostics(each, reports))) for each in reports]


class _Round:
    """Keeps the engine events of a single round."""

    facts: EngineFacts | None = None
    page: LoadPage | None = None

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.facts = facts

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.page = page

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Keep nothing: the round returns the failure, too."""


async def _check(engine: EngineClient, every: tuple[Endpoint, ...], settings: LoadSettings) -> EngineReport:
    events = _Round()
    endpoint = engine.endpoint
    poller = EnginePoller(engine, settings.source, events, monotonic)
    try:
        failure = await poller.round()
    except Exception as error:  # noqa: BLE001 - an exception over one engine must not cost all other reports
        failure = internal_failure(error)
    found: tuple[Diagnostic, ...] = ()
    if events.facts is not None:
        found = adapter_of(events.facts.kind).diagnostics(events.facts, endpoint)
        if events.facts.mode is not MODE_OF[endpoint.role]:
            failure = None  # the diagnostic has the same message
    source = poller.source if events.page is not None else None
    found = (*found, *_standstill_diagnostics(events.page))
    report = EngineReport(endpoint, events.facts, source, failure, found)
    return replace(report, diagnostics=(*found, *await _bootstrap_diagnostics(report, every)))


def compare_pool(reports: Iterable[EngineReport], pool: str) -> list[KindPair]:
    """Compare those prefill and decode endpoints of a pool whose engines were read and have the mode of their role."""
    sides: dict[Role, list[tuple[str, PairingKey]]] = {Role.PREFILL: [], Role.DECODE: []}
    for each in reports:
        role = each.endpoint.role
        if each.endpoint.pool == pool and role in sides and (key := _key_of(each)) is not None:
            sides[role].append((each.endpoint.url, key))
    return compare_kinds(sides[Role.PREFILL], sides[Role.DECODE])


def _key_of(report: EngineReport) -> PairingKey | None:
    """Return the pairing key of an endpoint; None if its engine was not read or cannot be paired at all."""
    facts, endpoint = report.facts, report.endpoint
    return None if facts is None or facts.mode is not MODE_OF[endpoint.role] else pairing_key(facts, endpoint.group)


def _pair_diagnostics(report: EngineReport, every: list[EngineReport]) -> Iterable[Diagnostic]:
    """Name the endpoints of the same pool with which this one cannot be paired, once for each reason.

    That groups differ is no problem as long as a partner is left.
    """
    own, endpoint = _key_of(report), report.endpoint
    other_role = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(endpoint.role)
    if other_role is None or own is None:
        return ()
    keys = [_key_of(each) for each in every if each.endpoint.pool == endpoint.pool and each.endpoint.role is other_role]
    others = [each for each in keys if each is not None]
    pairs = [(own, other) if endpoint.role is Role.PREFILL else (other, own) for other in others]
    found = [difference(*pair) for pair in pairs]
    is_alone = None not in found
    alone = _IS_ALONE if is_alone else ""
    return dict.fromkeys(
        Diagnostic(each.code, f"{each}, so they are never paired: {each.effect}{alone}", each.remedy, unusable=is_alone)
        for each in found
        if each is not None and (is_alone or each.name != GROUP)
    )


async def _bootstrap_diagnostics(report: EngineReport, every: tuple[Endpoint, ...]) -> tuple[Diagnostic, ...]:
    """Check whether decode engines can find a prefill engine, as far as that can be checked from here."""
    if report.bootstrap is None or report.facts is None:
        return ()
    host, port = report.bootstrap
    decodes = [each for each in every if each.role is Role.DECODE and each.pool == report.endpoint.pool]
    if _is_loopback(host) and not all(_is_loopback(each.host) for each in decodes):
        effect = f"decode servers on other machines are told to dial {host}, which is themselves"
        remedy = "set bootstrap_host to an address of the prefill server that they can reach"
        return (Diagnostic("bootstrap_host_is_loopback", effect, remedy, unusable=True),)
    if await _listens(host, port):
        return ()
    effect = f"nobody answers at {in_url(host)}:{port}, at least not from here; decode gives up after about 16 s"
    remedy = "set bootstrap_host and bootstrap_port to where decode servers reach the prefill server's registry"
    return (Diagnostic("bootstrap_unreachable", effect, remedy),)


def _standstill_diagnostics(page: LoadPage | None) -> tuple[Diagnostic, ...]:
    """Report a page that answers with old numbers: it comes from shared memory, whatever the scheduler does."""
    ages = [rank.age for rank in page.ranks if rank.age is not None] if page is not None else []
    if not ages or min(ages) < _OLD_SECONDS:
        return ()
    effect = f"its load page answers, but the newest load on it is {min(ages):.0f} s old: its scheduler stands still"
    remedy = "look for a hang in the log of the engine; while requests wait there, other engines are preferred"
    return (Diagnostic("load_stands_still", effect, remedy),)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _listens(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError, UnicodeError):
        return False
    writer.close()
    return True
