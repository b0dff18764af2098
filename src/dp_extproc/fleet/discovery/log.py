"""Logs what becomes of each discovered endpoint, and the failures of sources.

Endpoints in the configuration itself have no such lines: a reload logs them.
"""

import logging
from collections.abc import Callable, Collection, Hashable
from typing import Final

from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role, SourceKind
from dp_extproc.fleet.discovery.roster import Change, Roster
from dp_extproc.fleet.discovery.source import WHEN_EMPTY

_log = logging.getLogger(__name__)

_MOST_REASONS: Final = 5
"""Different reasons of one failure that are logged. One that names a request or a position differs at each try."""


class DiscoveryLog:
    """One line for each step in the life of a discovered endpoint. Implements ``EngineListener``."""

    def __init__(self, draining: Callable[[], Collection[Endpoint]]) -> None:
        """Begin without endpoints. *draining* returns those that have requests in flight after they left."""
        self._draining = draining
        self._joining: set[str] = set()
        """URLs of endpoints without a load page so far."""
        self._left: list[Endpoint] = []
        """Endpoints that left, and may have requests in flight."""
        self._failures: dict[Hashable, list[str]] = {}
        """The logged reasons of the present failure of each source."""
        self._empty: set[Hashable] = set()
        """Sources that report no members."""
        self._duplicates: frozenset[tuple[str, str, str]] = frozenset()

    def change(self, change: Change) -> None:
        """Log which endpoints joined, and which drain."""
        for endpoint, reason in change.left:
            self._joining.discard(endpoint.url)
            if endpoint.source is not SourceKind.STATIC:
                self._left.append(endpoint)
                _log.info("%s drains: %s", _named(endpoint), reason.value)
        joined = {endpoint.url: endpoint for endpoint in change.joined}
        self._left = [each for each in self._left if each.url not in joined or not each.is_same(joined[each.url])]
        for endpoint in change.joined:
            if endpoint.source is not SourceKind.STATIC:
                self._joining.add(endpoint.url)
                _log.info("%s joins pool %s as %s", _named(endpoint), endpoint.pool, endpoint.role)

    def review(self, roster: Roster) -> None:
        """Log failing and empty sources, URLs in several sources, and endpoints whose last request ended."""
        failures = {key: report.failure for key, report in roster.reports.items() if report.failure is not None}
        for key, failure in failures.items():
            logged = self._failures.setdefault(key, [])
            if failure not in logged and len(logged) < _MOST_REASONS:
                logged.append(failure)
                _log.error("%s fails, and its last endpoints stay: %s", roster.sources[key].name, failure)
        for key in self._failures.keys() - failures.keys():
            del self._failures[key]
            if key in roster.sources:
                _log.info(
                    "%s reports again (%d members)", roster.sources[key].name, len(roster.reports[key].members or ())
                )
        empty = {key for key, source in roster.sources.items() if source.source and roster.reports[key].members == ()}
        for key in empty - failures.keys() - self._empty:
            source = roster.sources[key]
            message = "%s lists no endpoints (pool %s, %s); the last ones, if there were any, stay for %gs; %s"
            remedy = WHEN_EMPTY[source.kind]
            _log.warning(message, source.name, source.place.pool, source.place.role, source.keep_for, remedy)
        self._empty = empty
        for url, first, other in sorted(roster.duplicates - self._duplicates):
            _log.warning("%s is listed by %s and by %s; the first one counts", url, first, other)
        self._duplicates = roster.duplicates
        if self._left:
            draining = {_identity(endpoint) for endpoint in self._draining()}
            for endpoint in self._left:
                if _identity(endpoint) not in draining:
                    _log.info("%s is gone: it has no more requests", _named(endpoint))
            self._left = [endpoint for endpoint in self._left if _identity(endpoint) in draining]

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Log nothing: an endpoint without a load page gets requests only if there is no other."""

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the first load page: from now on the endpoint gets requests."""
        if endpoint.url in self._joining:
            self._joining.discard(endpoint.url)
            _log.info("%s gets requests from now on", _named(endpoint))

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Log nothing: failures of engines have a log of their own."""


def _identity(endpoint: Endpoint) -> tuple[str, Role, str]:
    return endpoint.url, endpoint.role, endpoint.uid


def _named(endpoint: Endpoint) -> str:
    return f"{endpoint.url} ({endpoint.name})" if endpoint.name else endpoint.url
