"""Both legs of one attempt as a state machine: what each of its streams tells, and what is to be said on the others.

An attempt has up to three streams: the request's own (main), the prefill leg's, and for streaming answers one that
sees the first event. What is said on the main stream goes through the exchange, which knows what may still be said.

Rules that live here and nowhere else:

- A leg that fails ends the other one at once, and so does a client that leaves.
- The answer's head is held until prefill has answered, and for streams until the first event is no error. So a failure
  until then becomes a retry or a clean error, whatever status the engine began with.
- An endpoint is blamed for its own leg alone, unless the engine's message says that its peer is gone.
- What is the client's own fault (4xx) goes to the client as the engine said it, from whichever leg knows the reason.
"""

import math
from enum import IntEnum, auto
from typing import Final, Protocol

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.attempt.events import BufferBody, Continue, ExtendTimeout, Immediate, Phase, Reply, StreamBody
from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.exchange import Exchange
from dp_extproc.extproc.retries import RetryBudget
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.first_event import EngineError, FirstEvent

LEG_OPENS_SECONDS: Final = 2.0
"""How long an answer is held for a prefill leg that has not shown up. Usually it does before its engine is asked."""
EXTEND_AFTER_SECONDS: Final = 5.0
"""Envoy waits 20 s for an answer; a response that is held for longer than this needs more."""
TEXT_SECONDS: Final = 2.0
"""How long the text of an error may take whose head is there."""
_SHOWN_BYTES: Final = 2000
"""Of what an engine says about its failure."""

_ACCUSATIONS: Final = {
    Role.PREFILL: (b"Decode instance could be dead",),
    Role.DECODE: (b"Lost connection with prefill instance", b"Decode handshake failed", b"KVPoll.WaitingForInput"),
}
"""What engines say when the fault is their peer's: mooncake/conn.py, decode.py, common/conn.py."""


class Stream(IntEnum):
    """Where something is said."""

    MAIN = auto()
    PREFILL = auto()


Say = tuple[Stream, Reply]


class _Prefill(IntEnum):
    ABSENT = auto()
    """There is no such leg."""
    AWAITED = auto()
    OPEN = auto()
    REFUSING = auto()
    """It has answered with an error whose text is still to come."""
    DONE = auto()
    FAILED = auto()
    UNSEEN = auto()
    """It did not show up here; it may run all the same."""


class SupervisionObserver(Protocol):
    """Told what goes wrong; for metrics."""

    def leg_failed(self, leg: Role, reason: Reason, *, retried: bool) -> None: ...
    def leg_unseen(self) -> None: ...


class Failure(Struct, frozen=True):
    """Why an attempt cannot succeed."""

    leg: Role
    reason: Reason
    status: int
    message: str
    detail: bytes = b""
    """What the engine said."""
    blamed: bool = True
    """Whether it counts against the leg's endpoint; a timeout may be anybody's fault."""


class Supervision:
    """Watches one attempt."""

    __slots__ = (
        "_answers", "_budget", "_decode_refused_at", "_earlier", "_exchange", "_extended", "_held_at", "_observer",
        "_placed_at", "_prefill", "_prefill_done_at", "_prefill_events", "_prefill_refused_at", "_prefill_status",
        "_seen_first", "_settings", "_streaming", "attempt", "is_over", "over_at", "sees_text",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        attempt: InFlight,
        settings: SupervisionSettings,
        budget: RetryBudget,
        observer: SupervisionObserver,
        *,
        streaming: bool | None,
        sees_text: bool = False,
        earlier: int,
        now: float,
    ) -> None:
        """Begin, when the request has been placed.

        Args:
            exchange: The main stream's.
            attempt: What was placed.
            settings: How far to go.
            budget: Of retries.
            observer: Told of failures.
            streaming: Whether the client wants a stream of events; None where only the answer will tell.
            sees_text: Whether the text of prefill's answer is wanted.
            earlier: Attempts of this request that have failed.
            now: Monotonic seconds, as everywhere.
        """
        self.attempt = attempt
        self._exchange = exchange
        self._settings = settings
        self._budget = budget
        self._observer = observer
        self._streaming = streaming
        self.sees_text = sees_text
        self._earlier = earlier
        self._placed_at = now
        self._prefill = _Prefill.AWAITED if attempt.leg and settings.mode is not Supervise.OFF else _Prefill.ABSENT
        self._prefill_status = 0
        self._prefill_events: FirstEvent | None = None
        self._prefill_done_at: float | None = None
        self._prefill_refused_at = self._decode_refused_at = math.inf
        self._seen_first = not (streaming is not False and attempt.leg and settings.mode is Supervise.FIRST_EVENT)
        self._answers = tuple(host.health.answers for host in self._hosts())
        self._held_at: float | None = None
        self._extended = False
        self.is_over = False
        self.over_at = now

    # --- the prefill leg's stream ---

    def prefill_opened(self) -> list[Say]:
        """The leg is about to go to its engine."""
        if self.is_over:
            return [(Stream.PREFILL, _CANCEL)]
        self._prefill = _Prefill.OPEN
        return [(Stream.PREFILL, Continue(Phase.REQUEST_HEADERS))]

    def prefill_answered(self, status: int, now: float, *, has_body: bool, is_events: bool = False) -> list[Say]:
        """The leg's engine has answered, or Envoy in its place."""
        if is_events and has_body and status < 400:  # a head that may come before anything was done
            self._prefill_events = FirstEvent()
            return [(Stream.PREFILL, StreamBody(Phase.RESPONSE_HEADERS))]
        sees_text = self.sees_text and has_body and status < 400
        go_on: Say = (Stream.PREFILL, (StreamBody if sees_text else Continue)(Phase.RESPONSE_HEADERS))
        if status < 400:
            return [go_on, *self._prefill_done(status, now)]
        self.attempt.prefill_answered(status, now)
        self._prefill, self._prefill_status, self._prefill_refused_at = _Prefill.REFUSING, status, now
        if has_body and not self.is_over:
            return [(Stream.PREFILL, BufferBody(Phase.RESPONSE_HEADERS))]
        return [go_on, *self._prefill_failed(b"", now)]

    def prefill_explained(self, body: bytes, now: float, *, end_of_stream: bool = True) -> list[Say]:
        """The text of the leg's error has come, or some of its answer, of which only a stream's first event matters."""
        events = self._prefill_events
        if events is not None and not events.is_known:
            events.feed(body, end_of_stream=end_of_stream)
            go_on: Say = (Stream.PREFILL, Continue(Phase.RESPONSE_BODY))
            return [go_on, *(self._prefill_began(events.error, now) if events.is_known else ())]
        if self._prefill is not _Prefill.REFUSING:
            return [(Stream.PREFILL, Continue(Phase.RESPONSE_BODY))]
        return [(Stream.PREFILL, Continue(Phase.RESPONSE_BODY)), *self._prefill_failed(body, now)]

    def prefill_closed(self, now: float) -> list[Say]:
        """The leg's stream is over."""
        if self._prefill is _Prefill.REFUSING:
            return self._prefill_failed(b"", now)
        if self._prefill is _Prefill.OPEN and not self.is_over:
            self._prefill = _Prefill.FAILED
            return self._fail(
                Failure(Role.PREFILL, Reason.PREFILL_FAILED, 502, "the prefill server's connection was cut"), now
            )
        return []

    def _prefill_began(self, error: EngineError | None, now: float) -> list[Say]:
        if error is None:
            return self._prefill_done(200, now)
        self.attempt.prefill_answered(error.status, now)
        self._prefill_status = error.status
        return self._prefill_failed(error.body, now)

    def _prefill_done(self, status: int, now: float) -> list[Say]:
        self.attempt.prefill_answered(status, now)
        self._prefill, self._prefill_done_at = _Prefill.DONE, now
        if self.attempt.prefill_endpoint is not None:
            self.attempt.prefill_endpoint.health.succeeded()
        return self._open_gate()

    def _prefill_failed(self, body: bytes, now: float) -> list[Say]:
        status, self._prefill = self._prefill_status, _Prefill.FAILED
        if status < 500:
            return self._pass_on(status, body)
        message = f"the prefill server answered {status}"
        return self._fail(Failure(Role.PREFILL, Reason.PREFILL_FAILED, 502, message, body), now)

    # --- the main stream ---

    def decode_answered(self, status: int, now: float, *, has_body: bool, is_events: bool = False) -> list[Say]:
        """The response's head has come; the exchange holds it."""
        if self._streaming is None:
            self._streaming = is_events
            self._seen_first = self._seen_first or not is_events
        if status >= 500:
            if has_body and self._exchange.sees_answer:
                self._decode_refused_at = now
                return _main(self._exchange.take_body())
            return self.decode_explained(b"", now)
        if status >= 400 or self._settings.mode is Supervise.OFF:
            self._note_decode_success()
            return [*_main(self._exchange.let_go()), *self._cancel_prefill(now, only_if=status >= 400)]
        self._held_at = now
        self._seen_first = self._seen_first or not has_body
        return self._open_gate()

    def decode_explained(self, body: bytes, now: float) -> list[Say]:
        """The text of the answering server's error has come; it goes to the client if there is no other attempt."""
        self._blame(Role.DECODE, body, now)
        headers = self._retry_headers(Role.DECODE, Reason.DECODE_FAILED)
        return [*_main(self._exchange.let_go(headers)), *self._cancel_prefill(now)]

    def first_event(self, error: EngineError | None, now: float) -> list[Say]:
        """The first event of a streaming answer has come, or is an error."""
        self._seen_first = True
        if error is None:
            return self._open_gate()
        if error.status < 500:
            return [*self._pass_on(error.status, error.body), *self._cancel_prefill(now)]
        message = f"the decode server answered 200, and then the error {error.status}"
        return self._fail(Failure(Role.DECODE, Reason.DECODE_FAILED, 502, message, error.body), now)

    def closed(self, now: float) -> list[Say]:
        """The response is over, or the client has left."""
        return self._cancel_prefill(now)

    def sweep(self, now: float) -> list[Say]:
        """Let time pass: give up what takes too long, and have Envoy wait for what may still come."""
        if self.is_over:
            return []
        if self._prefill is _Prefill.REFUSING and now - self._prefill_refused_at > TEXT_SECONDS:
            return [*self._prefill_failed(b"", now), (Stream.PREFILL, _CANCEL)]
        if self._decode_refused_at < math.inf:
            if now - self._decode_refused_at <= TEXT_SECONDS:
                return []
            message = f"the decode server answered {self._exchange.status}, and did not say why"
            return self._fail(Failure(Role.DECODE, Reason.DECODE_FAILED, 502, message), now)
        if (failure := self._overdue(now)) is not None:
            self._blame_the_silent(failure.leg, now)
            return self._fail(failure, now)
        if self._held_at is None or self._exchange.is_responding:
            return []
        if self._prefill is _Prefill.AWAITED and now - self._held_at > LEG_OPENS_SECONDS:
            self._prefill = _Prefill.UNSEEN
            self._observer.leg_unseen()
            return self._open_gate()
        if not self._extended and now - self._held_at > EXTEND_AFTER_SECONDS:
            self._extended = True
            return [(Stream.MAIN, ExtendTimeout(self._settings.prefill_timeout + self._settings.first_token_timeout))]
        return []

    def _overdue(self, now: float) -> Failure | None:
        """Tell what has taken longer than it may."""
        settings = self._settings
        if self._prefill is _Prefill.OPEN and now - self._placed_at > settings.prefill_timeout:
            message = f"prefill took longer than {settings.prefill_timeout:g} s"
            return Failure(Role.PREFILL, Reason.PREFILL_TIMEOUT, 504, message, blamed=False)
        # An answer that is no stream has its head at its end, which may be far off. If the leg is not seen here, nobody
        # but the engine can tell whether it has failed.
        if not self._streaming or self._exchange.is_responding:
            return None
        since = self._prefill_done_at
        if self._prefill in {_Prefill.AWAITED, _Prefill.UNSEEN}:
            since = self._placed_at + settings.prefill_timeout
        if since is None or now - since <= settings.first_token_timeout:
            return None
        message = f"no token came within {settings.first_token_timeout:g} s after prefill"
        return Failure(Role.DECODE, Reason.DECODE_TIMEOUT, 504, message, blamed=False)

    # --- what follows ---

    def _open_gate(self) -> list[Say]:
        """Let the answer's head go, if nothing can turn out wrong any more that it would hide."""
        ready = self._seen_first and self._prefill in {_Prefill.ABSENT, _Prefill.DONE, _Prefill.UNSEEN}
        if self._held_at is None or not ready or self.is_over:
            return []
        self._note_decode_success()
        return _main(self._exchange.let_go())

    def _fail(self, failure: Failure, now: float) -> list[Say]:
        """End both legs; the client gets an error, or another attempt."""
        if failure.blamed:
            self._blame(failure.leg, failure.detail, now)
        if self.is_over or not self._exchange.can_be_abandoned:
            return self._cancel_prefill(now)
        headers = self._retry_headers(failure.leg, failure.reason)
        text = failure.detail[:_SHOWN_BYTES].decode(errors="replace").strip()
        rejection = Rejection(failure.status, failure.reason, f"{failure.message}: {text}" if text else failure.message)
        said = _main(self._exchange.abandon(rejection.status, rejection.body(), failure.reason, headers))
        return [*said, *self._cancel_prefill(now)]

    def _pass_on(self, status: int, body: bytes) -> list[Say]:
        """Give the client the error that is its own fault, as the engine said it."""
        if self.is_over:
            return []
        body = body or Rejection(status, Reason.ENGINE_REFUSED, f"the engine answered {status}").body()
        return _main(self._exchange.abandon(status, body, Reason.ENGINE_REFUSED, ()))

    def _retry_headers(self, leg: Role, reason: Reason) -> tuple[tuple[str, bytes], ...]:
        """Have the front door place the request anew, if it may be."""
        retried = self._budget.spend(self._earlier + 1)
        self._observer.leg_failed(leg, reason, retried=retried)
        if not retried:
            return ()
        return (
            (contract.RETRY, b"1"),
            (contract.FAILED, contract.write_failed(*(host.address for host in self._hosts()))),
        )

    def _cancel_prefill(self, now: float, *, only_if: bool = True) -> list[Say]:
        """End what still runs. Nothing is said about this attempt any more."""
        if self.is_over or not only_if:
            return []
        self.is_over, self.over_at = True, now
        return [(Stream.PREFILL, _CANCEL)] if self._prefill is _Prefill.OPEN else []

    @property
    def awaits_prefill(self) -> bool:
        """Whether the leg's stream may still open."""
        return self._prefill is _Prefill.AWAITED

    def _note_decode_success(self) -> None:
        if self.attempt.decode_endpoint is not None:
            self.attempt.decode_endpoint.health.succeeded()

    def _hosts(self) -> list[EndpointLoad]:
        return [host for host in (self.attempt.prefill_endpoint, self.attempt.decode_endpoint) if host is not None]

    def _blame_the_silent(self, leg: Role, now: float) -> None:
        """Count a timeout against whoever has answered nothing at all since the request was placed."""
        for host, before in zip(self._hosts(), self._answers, strict=True):
            # Decode may hold prefill up, but not the other way round.
            if host.health.answers == before and (leg is Role.PREFILL or leg is host.role):
                host.health.failed(now)

    def _blame(self, leg: Role, text: bytes, now: float) -> None:
        prefill, decode = self.attempt.prefill_endpoint, self.attempt.decode_endpoint
        accused = prefill is not None and any(words in text for words in _ACCUSATIONS[leg])
        guilty = prefill if (leg is Role.PREFILL) != accused else decode
        if guilty is not None:
            guilty.health.failed(now)


_CANCEL: Final = Immediate(503, b"", (), "cancelled", {contract.META_REASON: "cancelled"})
"""Ends a prefill leg; nobody reads its answer."""


def _main(replies: tuple[Reply, ...]) -> list[Say]:
    return [(Stream.MAIN, reply) for reply in replies]
