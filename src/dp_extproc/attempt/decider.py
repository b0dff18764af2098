"""The interface of scheduling that an attempt uses."""

from typing import Protocol

from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection
from dp_extproc.scheduling.decision import Answer, Decision, Queued, RequestContext, SchedulingResult


class Decider(Protocol):
    """What the exchange asks; implemented by :class:`dp_extproc.scheduling.scheduler.Scheduler`."""

    def place(self, api: Api, body: bytes, context: RequestContext) -> SchedulingResult:
        """Schedule an inference request."""
        ...

    def place_unread(self, api: Api, length: int | None, context: RequestContext) -> SchedulingResult:
        """Schedule an inference request whose body does not pass through the service."""
        ...

    def place_queued(self, queued: Queued, context: RequestContext) -> SchedulingResult:
        """Schedule a request again that had to wait."""
        ...

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        """Decide on a request without a body that any engine can answer."""
        ...

    def models(self, path: str) -> Answer | Rejection:
        """Answer a question for the models."""
        ...

    def lost(self, address: str) -> None:
        """Take note that the server at this address has dropped a request."""
        ...
