"""Logs engine events: failures when they begin, change or end, and each diagnostic once.

It also logs when engines of a pool cannot be paired, and when this is over.
"""

import logging
from collections.abc import Collection, Iterable

from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.compatibility import Difference, difference
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import MODE_OF, WRONG_MODE, Endpoint, EngineFacts, LoadPage, PairTerms, Role, Version

_log = logging.getLogger(__name__)

_Group = tuple[str, PairTerms, Version | None]
"""A pool, and everything on which the pairing of its engines depends."""


class EngineLog:
    """Logs engine events. Implements ``EngineListener``.

    A failure may follow the sample of the same round. Therefore a sample ends the failure before it only if the next
    event is no such failure.
    """

    def __init__(self, logger: logging.Logger = _log) -> None:
        self._states = EndpointStateLog(logger)
        self._diagnostics = DiagnosticLog(logger)
        self._pairs = PairLog(logger)
        self._sampled: set[str] = set()
        """URLs of endpoints whose last event is a sample."""

    def forget_all_but(self, endpoints: Iterable[Endpoint]) -> None:
        """Forget the endpoints that were removed."""
        endpoints = frozenset(endpoints)
        urls = {endpoint.url for endpoint in endpoints}
        self._states.forget_all_but(urls)
        self._pairs.forget_all_but(endpoints)
        self._sampled &= urls

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the diagnostics of an engine, and the engines that it cannot be paired with."""
        self._diagnostics.note(endpoint, facts)
        self._pairs.note(endpoint, facts)

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the end of a failure if the last event was a sample, too."""
        if endpoint.url in self._sampled:
            self._states.note(endpoint.url, None)
        self._sampled.add(endpoint.url)

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the failure, and before it the end of the last one if a whole round without failure lies between."""
        if endpoint.url in self._sampled and not failure.page_was_read:
            self._states.note(endpoint.url, None)
        self._sampled.discard(endpoint.url)
        self._states.note(endpoint.url, failure)


class EndpointStateLog:
    """Logs the failures of endpoints. An engine that is down for an hour is one line, not one per round."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._current: dict[str, EngineFailure] = {}

    def forget_all_but(self, urls: Collection[str]) -> None:
        self._current = {url: failure for url, failure in self._current.items() if url in urls}

    def note(self, url: str, failure: EngineFailure | None) -> None:
        """Take the failure of a round; None if there was none."""
        present = self._current.get(url)
        if failure is None:
            if present is not None:
                del self._current[url]
                self._logger.info("%s is well again (was: %s)", url, present.kind)
        elif present is None or present.kind is not failure.kind:
            self._current[url] = failure
            self._logger.warning("%s: %s: %s", url, failure.kind, failure.message)


class DiagnosticLog:
    """Logs each diagnostic once for each pool and role, since the engines of a pool are mostly equal."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged: set[tuple[str, str, str]] = set()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        """Log the diagnostics of an engine that were not logged yet."""
        for diagnostic in adapter_of(facts.kind).diagnostics(facts, endpoint):
            key = (endpoint.pool, endpoint.role.value, diagnostic.code)
            if key not in self._logged and diagnostic.code != WRONG_MODE:  # logged as a disagreement
                self._logged.add(key)
                level = logging.WARNING if diagnostic.unusable else logging.INFO
                self._logger.log(
                    level, "%s: %s: %s; remedy: %s", endpoint.url, diagnostic.code, diagnostic.effect, diagnostic.remedy
                )


class PairLog:
    """Logs each difference by which engines of a pool cannot be paired once, for all engines that have it."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._facts: dict[Endpoint, EngineFacts] = {}
        self._logged: set[tuple[str, Difference]] = set()

    def forget_all_but(self, endpoints: Collection[Endpoint]) -> None:
        self._facts = {endpoint: facts for endpoint, facts in self._facts.items() if endpoint in endpoints}
        self._update()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        before = self._facts.get(endpoint)
        self._facts[endpoint] = facts
        if before is None or (before.terms, before.version, before.mode) != (facts.terms, facts.version, facts.mode):
            self._update()

    def _update(self) -> None:
        present: dict[tuple[str, Difference], tuple[list[str], list[str]]] = {}
        prefills, decodes = self._by_group(Role.PREFILL), self._by_group(Role.DECODE)
        for (pool, _, _), (facts, urls) in prefills.items():
            for (other_pool, _, _), (other_facts, other_urls) in decodes.items():
                if pool == other_pool and (found := difference(facts, other_facts)) is not None:
                    both = present.setdefault((pool, found), ([], []))
                    for listed, more in zip(both, (urls, other_urls), strict=True):
                        listed.extend(url for url in more if url not in listed)
        for (pool, found), (urls, other_urls) in present.items():
            if (pool, found) not in self._logged:
                self._logger.warning(
                    "pool %s: %s: %s (prefill: %s; decode: %s), so they are never paired: %s; remedy: %s",
                    pool, found.code, found, ", ".join(urls), ", ".join(other_urls), found.effect, found.remedy,
                )  # fmt: skip
        for pool, found in sorted(self._logged - present.keys()):
            self._logger.info("pool %s: no servers differ any more in that %s", pool, found)
        self._logged = set(present)

    def _by_group(self, role: Role) -> dict[_Group, tuple[EngineFacts, list[str]]]:
        """Group engines by everything on which pairing depends. A large fleet has few groups."""
        found: dict[_Group, tuple[EngineFacts, list[str]]] = {}
        for endpoint, facts in self._facts.items():
            if endpoint.role is role and facts.mode is MODE_OF[role]:
                found.setdefault((endpoint.pool, facts.terms, facts.version), (facts, []))[1].append(endpoint.url)
        return found
