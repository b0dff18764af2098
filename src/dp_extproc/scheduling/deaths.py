"""Observes which engines have died, for the requests that were lost with them."""

from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage
from dp_extproc.load.cache import LoadCache
from dp_extproc.scheduling.deadly import DeadlyRequests


class EngineDeaths:
    """Notes which engines refuse connections, and which report their load. Implements ``EngineListener``."""

    def __init__(self, load: LoadCache, deadly: DeadlyRequests) -> None:
        self._load = load
        self._deadly = deadly

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Ignore the facts: a sample follows them."""

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        if len(self._deadly) and (load := self._load.by_url.get(endpoint.url)) is not None:
            self._deadly.alive(load.address, started)

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        load = self._load.by_url.get(endpoint.url)
        if len(self._deadly) and load is not None and failure.kind is FailureKind.REFUSED:
            self._deadly.refused(load.address, now)
