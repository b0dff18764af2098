"""Logs when the scheduler of an engine stands still, and when it goes on."""

import logging
from collections.abc import Iterable

from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage
from dp_extproc.load.cache import LoadCache

_log = logging.getLogger(__name__)


class SuspectLog:
    """Logs changes of the suspect ranks of each endpoint. Implements ``EngineListener``, behind the load cache."""

    def __init__(self, loads: LoadCache, logger: logging.Logger = _log) -> None:
        self._loads = loads
        self._logger = logger
        self._suspect: dict[str, tuple[int, ...]] = {}
        """The suspect ranks of each endpoint that has some, by URL."""

    def forget_all_but(self, endpoints: Iterable[Endpoint]) -> None:
        """Forget the endpoints that were removed."""
        urls = {endpoint.url for endpoint in endpoints}
        self._suspect = {url: ranks for url, ranks in self._suspect.items() if url in urls}

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Log nothing."""

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        """Log the ranks that have become suspect by this page, or are so no longer."""
        load = self._loads.by_url.get(endpoint.url)
        suspect = () if load is None else tuple(rank.index for group in load.suspect_groups for rank in group.ranks)
        before = self._suspect.pop(endpoint.url, ())
        if suspect:
            self._suspect[endpoint.url] = suspect
        if suspect == before:
            return
        if suspect:
            message = "%s: its load page answers, but its scheduler stands still (DP ranks %s); others are preferred"
            self._logger.warning(message, endpoint.url, ", ".join(map(str, suspect)))
        else:
            self._logger.info("%s: its scheduler goes on (DP ranks %s)", endpoint.url, ", ".join(map(str, before)))

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        """Log nothing: failures of engines have a log of their own."""
