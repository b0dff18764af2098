"""Says each endpoint's trouble once when it begins or changes its kind, and once when it is over; and pitfalls once."""

import logging
from collections.abc import Collection

from dp_extproc.fleet.endpoint import Endpoint, EngineFacts
from dp_extproc.fleet.observer import ScrapeFailure
from dp_extproc.fleet.traps import WRONG_MODE, traps_of


class TroubleLog:
    """What has been said about whom. An engine that is down for an hour is one line, not 3600."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._current: dict[str, ScrapeFailure] = {}

    def forget_all_but(self, urls: Collection[str]) -> None:
        """Forget those that are watched no more."""
        self._current = {url: failure for url, failure in self._current.items() if url in urls}

    def note(self, url: str, failure: ScrapeFailure | None) -> None:
        """Take in how the last round with *url* went; None is well."""
        known = self._current.get(url)
        if failure is None:
            if known is not None:
                del self._current[url]
                self._logger.info("%s is well again (was: %s)", url, known.kind)
        elif known is None or known.kind is not failure.kind:
            self._current[url] = failure
            self._logger.warning("%s: %s: %s", url, failure.kind, failure.message)


class TrapLog:
    """Which pitfalls have been said. All engines of a pool and role have the same ones: each is told of the first."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[tuple[str, str, str]] = set()

    def note(self, endpoint: Endpoint, facts: EngineFacts) -> None:
        """Say what an operator should know of an engine and has not been told yet."""
        for trap in traps_of(facts, endpoint):
            key = (endpoint.pool, endpoint.role.value, trap.code)
            if key not in self._said and trap.code != WRONG_MODE:  # a disagreement, which is said as trouble
                self._said.add(key)
                level = logging.WARNING if trap.unusable else logging.INFO
                self._logger.log(level, "%s: %s: %s; remedy: %s", endpoint.url, trap.code, trap.happens, trap.remedy)
