"""Says each endpoint's trouble once when it begins or changes its kind, and once when it is over; and pitfalls once.

Likewise which prefill and decode servers must not be paired: once when it is found out, and once when it is over.
"""

import logging
from collections.abc import Collection

from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.compatibility import Difference, difference
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import MODE_OF, WRONG_MODE, Endpoint, EngineFacts, LoadPage, PairTerms, Role, Version

_log = logging.getLogger(__name__)

_Kind = tuple[str, PairTerms, Version | None]
"""A pool, and all that decides whom one of its servers can be paired with."""


class EngineLog:
    """Writes engine events to the log: an :class:`dp_extproc.engines.listener.EngineListener`.

    A failure may follow a sample of the same round. So the end of a failure is logged only with the next event.
    """

    def __init__(self, logger: logging.Logger = _log) -> None:
        self._states = EndpointStateLog(logger)
        self._diagnostics = DiagnosticLog(logger)
        self._pairs = PairLog(logger)
        self._sampled: set[str] = set()
        """URLs of endpoints whose last event is a sample."""

    def forget_all_but(self, endpoints: Collection[Endpoint]) -> None:
        """Forget the endpoints that were removed."""
        urls = {endpoint.url for endpoint in endpoints}
        self._states.forget_all_but(urls)
        self._pairs.forget_all_but(endpoints)
        self._sampled &= urls

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the diagnostics of an engine, and the engines that it cannot be paired with."""
        self._diagnostics.note(endpoint, facts)
        self._pairs.note(endpoint, facts)

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the end of a failure if no failure followed the sample before."""
        if endpoint.url in self._sampled:
            self._states.note(endpoint.url, None)
        self._sampled.add(endpoint.url)

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the beginning of a failure."""
        if endpoint.url in self._sampled and not failure.page_was_read:
            self._states.note(endpoint.url, None)
        self._sampled.discard(endpoint.url)
        self._states.note(endpoint.url, failure)


class EndpointStateLog:
    """What has been said about whom. An engine that is down for an hour is one line, not 3600."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._current: dict[str, EngineFailure] = {}

    def forget_all_but(self, urls: Collection[str]) -> None:
        """Forget those that are watched no more."""
        self._current = {url: failure for url, failure in self._current.items() if url in urls}

    def note(self, url: str, failure: EngineFailure | None) -> None:
        """Take in how the last round with *url* went; None is well."""
        known = self._current.get(url)
        if failure is None:
            if known is not None:
                del self._current[url]
                self._logger.info("%s is well again (was: %s)", url, known.kind)
        elif known is None or known.kind is not failure.kind:
            self._current[url] = failure
            self._logger.warning("%s: %s: %s", url, failure.kind, failure.message)


class DiagnosticLog:
    """Which pitfalls have been said. All engines of a pool and role have the same ones: each is told of the first."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[tuple[str, str, str]] = set()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        """Say what an operator should know of an engine and has not been told yet."""
        for diagnostic in adapter_of(facts.kind).diagnostics(facts, endpoint):
            key = (endpoint.pool, endpoint.role.value, diagnostic.code)
            if key not in self._said and diagnostic.code != WRONG_MODE:  # a disagreement, which is said as trouble
                self._said.add(key)
                level = logging.WARNING if diagnostic.unusable else logging.INFO
                self._logger.log(
                    level, "%s: %s: %s; remedy: %s", endpoint.url, diagnostic.code, diagnostic.effect, diagnostic.remedy
                )


class PairLog:
    """Which differences have been said of servers of a pool that cannot be paired, however many have them."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._facts: dict[Endpoint, EngineFacts] = {}
        self._said: set[tuple[str, Difference]] = set()

    def forget_all_but(self, endpoints: Collection[Endpoint]) -> None:
        """Forget those that are watched no more."""
        self._facts = {endpoint: facts for endpoint, facts in self._facts.items() if endpoint in endpoints}
        self._say()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        """Take in what an engine says of itself."""
        before = self._facts.get(endpoint)
        self._facts[endpoint] = facts
        if before is None or (before.terms, before.version, before.mode) != (facts.terms, facts.version, facts.mode):
            self._say()

    def _say(self) -> None:
        present: dict[tuple[str, Difference], tuple[list[str], list[str]]] = {}
        prefills, decodes = self._by_kind(Role.PREFILL), self._by_kind(Role.DECODE)
        for (pool, _, _), (facts, urls) in prefills.items():
            for (other_pool, _, _), (other_facts, other_urls) in decodes.items():
                if pool == other_pool and (found := difference(facts, other_facts)) is not None:
                    both = present.setdefault((pool, found), ([], []))
                    for known, more in zip(both, (urls, other_urls), strict=True):
                        known.extend(url for url in more if url not in known)
        for (pool, found), (urls, other_urls) in present.items():
            if (pool, found) not in self._said:
                self._logger.warning(
                    "pool %s: %s: %s (prefill: %s; decode: %s), so they are never paired: %s; remedy: %s",
                    pool, found.code, found, ", ".join(urls), ", ".join(other_urls), found.effect, found.remedy,
                )  # fmt: skip
        for pool, found in sorted(self._said - present.keys()):
            self._logger.info("pool %s: no servers differ any more in that %s", pool, found)
        self._said = set(present)

    def _by_kind(self, role: Role) -> dict[_Kind, tuple[EngineFacts, list[str]]]:
        """Sort servers by what decides whom they can be paired with: a large fleet has few kinds."""
        found: dict[_Kind, tuple[EngineFacts, list[str]]] = {}
        for endpoint, facts in self._facts.items():
            if endpoint.role is role and facts.mode is MODE_OF[role]:
                found.setdefault((endpoint.pool, facts.terms, facts.version), (facts, []))[1].append(endpoint.url)
        return found
