"""What an attempt reports to metrics, logs and traces."""

from typing import Protocol

from msgspec import Struct

from dp_extproc.engines.model import Role
from dp_extproc.request.rejection import Reason


class Decided(Struct, frozen=True):
    """A request was routed, answered or refused."""

    outcome: str
    """``routed``, ``answered`` (by the service itself), or the reason of a refusal."""
    seconds: float
    """Work since the event that made the decision possible."""


class LegFailed(Struct, frozen=True):
    """A leg of an attempt has failed."""

    leg: Role
    reason: Reason
    retried: bool
    """Whether the gateway is to schedule the request again."""


class AttemptListener(Protocol):
    """Receives what happens to attempts. Calls are made on the request path, so each must be short."""

    def attempt_opened(self) -> None:
        """A main stream has opened."""

    def decided(self, decided: Decided) -> None:
        """Scheduling, or the answer without it, is done."""

    def leg_failed(self, failed: LegFailed) -> None:
        """A leg has failed by the fault of an endpoint."""

    def leg_missing(self) -> None:
        """The stream of a prefill leg has not opened in time."""

    def destination_mismatch(self) -> None:
        """A gateway has sent a request to another endpoint than the picked one."""

    def held(self, seconds: float, *, in_vain: bool) -> None:
        """Response headers were held, and have gone to the client; *in_vain* is whether prefill was still awaited."""

    def responses_skipped(self) -> None:
        """A gateway has ended a main stream before the response, while the prefill leg was awaited."""

    def attempt_closed(self) -> None:
        """A main stream has ended."""
