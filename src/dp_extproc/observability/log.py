"""Logs engine events: failures when they begin, change or end, and each diagnostic once.

It also logs when engines of a pool cannot be paired, and when this is over; and when a revision group is complete.
"""

import logging
from collections.abc import Collection, Iterable

from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.compatibility import GROUP, Difference, PairingKey, compare_kinds, pairing_key
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import MODE_OF, WRONG_MODE, Endpoint, EngineFacts, LoadPage, Role

_log = logging.getLogger(__name__)


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
    """Logs which endpoints cannot be paired, and which revision groups have a pair.

    Each difference by which engines of a pool cannot be paired is logged once, for all engines that have it. A group is
    logged when it is complete, and when it is so no longer.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._facts: dict[Endpoint, EngineFacts] = {}
        self._logged: set[tuple[str, Difference]] = set()
        self._complete: set[tuple[str, str]] = set()
        """Pools and names of the groups that have a pair."""

    def forget_all_but(self, endpoints: Collection[Endpoint]) -> None:
        # An engine keeps its facts if its endpoint has only another group, source or pool.
        known = {endpoint.url: (endpoint, facts) for endpoint, facts in self._facts.items()}
        self._facts = {
            each: known[each.url][1] for each in endpoints if each.url in known and each.is_same(known[each.url][0])
        }
        self._update()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        before = self._facts.get(endpoint)
        self._facts[endpoint] = facts
        if before is None or (before.terms, before.version, before.mode) != (facts.terms, facts.version, facts.mode):
            self._update()

    def _update(self) -> None:
        present: dict[tuple[str, Difference], tuple[list[str], list[str]]] = {}
        complete = set()
        for pool, sides in self._sides().items():
            for pair in compare_kinds(sides[Role.PREFILL], sides[Role.DECODE]):
                found = pair.difference
                if found is None and pair.group is not None:
                    complete.add((pool, pair.group))
                elif found is not None and found.name != GROUP:
                    both = present.setdefault((pool, found), ([], []))
                    for listed, more in zip(both, (pair.prefills, pair.decodes), strict=True):
                        listed.extend(url for url in more if url not in listed)
        self._log_groups(complete)
        for (pool, found), (urls, other_urls) in present.items():
            if (pool, found) not in self._logged:
                self._logger.warning(
                    "pool %s: %s: %s (prefill: %s; decode: %s), so they are never paired: %s; remedy: %s",
                    pool, found.code, found, ", ".join(urls), ", ".join(other_urls), found.effect, found.remedy,
                )  # fmt: skip
        for pool, found in sorted(self._logged - present.keys()):
            self._logger.info("pool %s: no servers differ any more in that %s", pool, found)
        self._logged = set(present)

    def _log_groups(self, complete: set[tuple[str, str]]) -> None:
        for pool, group in sorted(complete - self._complete):
            self._logger.info("pool %s: group %s is complete, so it gets requests", pool, group)
        for pool, group in sorted(self._complete - complete):
            if any((endpoint.pool, endpoint.group) == (pool, group) for endpoint in self._facts):
                message = "pool %s: group %s has no pair of prefill and decode any more, so it gets no requests"
                self._logger.warning(message, pool, group)
            else:
                self._logger.info("pool %s: group %s is gone", pool, group)
        self._complete = complete

    def _sides(self) -> dict[str, dict[Role, list[tuple[str, PairingKey]]]]:
        """Return URL and pairing key of each endpoint that runs in the mode of its role, by pool and role."""
        pools: dict[str, dict[Role, list[tuple[str, PairingKey]]]] = {}
        for endpoint, facts in self._facts.items():
            if facts.mode is MODE_OF[endpoint.role]:
                sides = pools.setdefault(endpoint.pool, {role: [] for role in Role})
                sides[endpoint.role].append((endpoint.url, pairing_key(facts, endpoint.group)))
        return pools
