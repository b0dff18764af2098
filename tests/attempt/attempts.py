"""Attempts without gRPC, for tests: events in, replies out."""

from dp_extproc import contract
from dp_extproc.attempt.attempt import Attempt
from dp_extproc.attempt.effects import Environment
from dp_extproc.attempt.events import (
    AbortRequests,
    BodyMode,
    Command,
    Enqueue,
    Event,
    InternalError,
    Reply,
    RoomFreed,
    SendLeg,
    ToLeg,
)
from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.attempt.gateways import BundledEnvoy, EndpointPicker, Gateway
from dp_extproc.attempt.intake import Decider
from dp_extproc.attempt.listener import AttemptListener
from dp_extproc.attempt.transitions import UNDECIDED
from dp_extproc.config.reliability import RetrySettings, SupervisionSettings
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import LegAbort
from extproc.wire import UNSUPERVISED, Watcher

BODY_PAUSE = 60.0


def make_environment(
    decider: Decider,
    *,
    gateway: Gateway | None = None,
    listener: AttemptListener | None = None,
    supervision: SupervisionSettings = UNSUPERVISED,
    retry: RetrySettings | None = None,
    max_body: int = 1 << 20,
) -> Environment:
    """Make the environment of attempts."""
    return Environment(
        decider=decider,
        gateway=gateway or BundledEnvoy(),
        listener=listener or Watcher(),
        budget=RetryBudget(retry or RetrySettings()),
        supervision=supervision,
        max_body=max_body,
        body_pause=BODY_PAUSE,
        clock=lambda: 1e6,
    )


class Exchange:
    """The main stream of an attempt that is not supervised."""

    def __init__(
        self,
        decider: Decider,
        mode: BodyMode,
        max_body: int,
        *,
        response_mode: BodyMode = BodyMode.LOCKSTEP,
        picks: bool = False,
        session_header: str | None = contract.SESSION,
    ) -> None:
        gateway = EndpointPicker(session_header) if picks else BundledEnvoy()
        self.watcher = Watcher()
        environment = make_environment(decider, gateway=gateway, listener=self.watcher, max_body=max_body)
        self.attempt = Attempt(environment, mode, response_mode)

    def receive(self, event: Event) -> tuple[Reply, ...]:
        return _replies(self.attempt.receive(event, 0.0))

    def fail(self, message: str) -> tuple[Reply, ...]:
        return self.receive(InternalError(message))

    def expire(self) -> tuple[Reply, ...]:
        """Have the body pause for longer than it may."""
        return _replies(self.attempt.advance(BODY_PAUSE + 1.0))

    def decide_again(self, ticket: Ticket) -> tuple[Reply, ...]:
        return self.receive(RoomFreed(ticket))

    @property
    def _body(self) -> list[bytes]:
        return self.attempt.main._intake._body

    @_body.setter
    def _body(self, body: list[bytes]) -> None:
        self.attempt.main._intake._body = body

    @property
    def is_waiting(self) -> bool:
        return self.attempt.main.is_queued

    @property
    def is_decided(self) -> bool:
        return self.attempt.main.state not in UNDECIDED

    @property
    def is_routed(self) -> bool:
        return self.attempt.main.is_routed

    @property
    def failed(self) -> tuple[frozenset[str], ...]:
        return self.attempt.main._intake.earlier.failed

    @property
    def cut(self) -> str | None:
        return self.attempt.main._intake.earlier.lost


def _replies(commands: list[Command]) -> tuple[Reply, ...]:
    return tuple(
        command for command in commands if not isinstance(command, ToLeg | Enqueue | SendLeg | LegAbort | AbortRequests)
    )
