"""Contacts every engine once, as the scraper would, and gathers what is to be said about it."""

import asyncio
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from dp_extproc.config.load import LoadSettings, LoadSource
from dp_extproc.engines.agreement import MODE_OF
from dp_extproc.engines.compatibility import difference
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineFailure, FailureKind, unexpected
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role, in_url
from dp_extproc.engines.sglang.diagnostics import Diagnostic, traps_of
from dp_extproc.engines.sglang.server_info import DEFAULT_BOOTSTRAP_PORT
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.fleet.sources.polling import EngineWatch

_CONNECT_SECONDS: Final = 2.0
IS_ALONE: Final = "; no server of the pool is left that it can be paired with"


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What one engine answered."""

    endpoint: Endpoint
    facts: EngineFacts | None
    source: LoadSource | None
    """Which page told the load; None if none did."""
    failure: EngineFailure | None
    traps: tuple[Diagnostic, ...]

    @property
    def is_usable(self) -> bool:
        """Whether requests can be placed on it by its load."""
        if self.facts is None or any(trap.unusable for trap in self.traps):
            return False
        return self.failure is None or self.failure.kind is FailureKind.DISAGREEMENT

    @property
    def state(self) -> str:
        """Sum it up in a word or two."""
        if self.failure is not None:
            return self.failure.kind.value
        return "ok" if self.is_usable else "unusable"

    @property
    def bootstrap(self) -> tuple[str, int] | None:
        """Where decode servers find this prefill server; None for others."""
        if self.endpoint.role is not Role.PREFILL:
            return None
        told = self.facts.bootstrap_port if self.facts else None
        host = self.endpoint.bootstrap_host or self.endpoint.host
        return host, self.endpoint.bootstrap_port or told or DEFAULT_BOOTSTRAP_PORT


async def check_engines(
    endpoints: Iterable[Endpoint], settings: LoadSettings, credentials: Credentials = NO_CREDENTIALS
) -> list[EngineReport]:
    """Contact every endpoint, all at the same time; the reports are in the order of the endpoints."""
    everyone = tuple(endpoints)
    async with make_client() as client:
        reports = await asyncio.gather(
            *(_check(EngineClient(each, settings, client, credentials), everyone, settings) for each in everyone)
        )
    return _with_pairs(reports)


class _Note:
    """An observer of a single round."""

    facts: EngineFacts | None = None
    sampled_once = False

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.facts = facts

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.sampled_once = True

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Leave it: the round returns it, too."""


async def _check(engine: EngineClient, everyone: tuple[Endpoint, ...], settings: LoadSettings) -> EngineReport:
    note = _Note()
    endpoint = engine.endpoint
    watch = EngineWatch(engine, settings.source, note, monotonic)
    try:
        failure = await watch.round()
    except Exception as error:  # noqa: BLE001 - one engine must not take the report of all others away
        failure = unexpected(error)
    found: tuple[Diagnostic, ...] = ()
    if note.facts is not None:
        found = traps_of(note.facts, endpoint)
        if note.facts.mode is not MODE_OF[endpoint.role]:
            failure = None  # the trap says the same
    source = watch.source if note.sampled_once else None
    report = EngineReport(endpoint, note.facts, source, failure, found)
    return replace(report, traps=(*found, *await _bootstrap_traps(report, everyone)))


def _with_pairs(reports: list[EngineReport]) -> list[EngineReport]:
    """Add to each report with which servers of its pool this one cannot be paired."""
    return [replace(each, traps=(*each.traps, *_pair_traps(each, reports))) for each in reports]


def _pair_traps(report: EngineReport, everyone: list[EngineReport]) -> Iterable[Diagnostic]:
    own, endpoint = report.facts, report.endpoint
    other_side = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(endpoint.role)
    if own is None or own.mode is not MODE_OF[endpoint.role]:
        return ()
    others = [
        each.facts
        for each in everyone
        if each.endpoint.pool == endpoint.pool
        and each.endpoint.role is other_side
        and each.facts is not None
        and each.facts.mode is MODE_OF[each.endpoint.role]
    ]
    pairs = [(own, other) if endpoint.role is Role.PREFILL else (other, own) for other in others]
    found = [difference(*pair) for pair in pairs]
    is_alone = None not in found
    return dict.fromkeys(
        Diagnostic(
            each.code,
            f"{each}, so they are never paired: {each.happens}" + (IS_ALONE if is_alone else ""),
            each.remedy,
            unusable=is_alone,
        )
        for each in found
        if each is not None
    )


async def _bootstrap_traps(report: EngineReport, everyone: tuple[Endpoint, ...]) -> list[Diagnostic]:
    """Look whether decode servers can find a prefill server, as far as that shows from here."""
    if report.bootstrap is None or report.facts is None:
        return []
    host, port = report.bootstrap
    found = []
    decodes = [each for each in everyone if each.role is Role.DECODE and each.pool == report.endpoint.pool]
    if _is_loopback(host) and not all(_is_loopback(each.host) for each in decodes):
        found.append(
            Diagnostic(
                "bootstrap_host_is_loopback",
                f"decode servers on other machines are told to dial {host}, which is themselves",
                "set bootstrap_host to an address of the prefill server that they can reach",
                unusable=True,
            )
        )
    elif not await _listens(host, port):
        found.append(
            Diagnostic(
                "bootstrap_unreachable",
                f"nobody answers at {in_url(host)}:{port}, at least not from here; decode gives up after about 16 s",
                "set bootstrap_host and bootstrap_port to where decode servers reach the prefill server's registry",
            )
        )
    return found


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
