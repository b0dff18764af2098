"""Everything that an attempt changes outside of itself: reservations, endpoint health, retry budget and listener."""

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.attempt.failures import Blame, Failure, RetryBudget
from dp_extproc.attempt.gateways import EarlierAttempts, Gateway, Headers
from dp_extproc.attempt.intake import Decider
from dp_extproc.attempt.listener import AttemptListener, Decided, LegFailed
from dp_extproc.config.reliability import SupervisionSettings
from dp_extproc.contract import EngineError
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.rejection import Reason

_ACCUSATIONS: Final = {
    Role.PREFILL: (b"Decode instance could be dead",),
    Role.DECODE: (b"Lost connection with prefill instance", b"Decode handshake failed", b"KVPoll.WaitingForInput"),
}
"""Texts by which an engine accuses its peer: mooncake/conn.py, decode.py, common/conn.py."""


class Environment(Struct, frozen=True):
    """The collaborators and settings that all attempts of a service share."""

    decider: Decider
    gateway: Gateway
    listener: AttemptListener
    budget: RetryBudget
    supervision: SupervisionSettings
    max_body: int
    """Size in bytes above which a request body is refused."""
    body_pause: float
    """Seconds for which a body in duplex may pause. Envoy has no timeout of its own in this mode."""
    clock: Callable[[], float]
    """Monotonic seconds, as in every ``now``. It measures how long a decision takes."""


class Effects:
    """The effects of one attempt."""

    __slots__ = (
        "_answers", "_decode", "_earlier_error", "_endpoints", "_environment", "_fingerprint", "_in_flight",
        "_is_put_off", "_prefill", "token",
    )  # fmt: skip

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.token = ""
        """Token of the prefill leg; empty if the attempt has none."""
        self._in_flight: InFlight | None = None
        self._prefill: EndpointLoad | None = None
        self._decode: EndpointLoad | None = None
        self._endpoints: list[EndpointLoad] = []
        self._answers: list[int] = []
        """Number of legs that each endpoint had served at the pick."""
        self._fingerprint = ""
        self._earlier_error: EngineError | None = None
        """The engine's error of the attempt before, until it is known whether it counts."""
        self._is_put_off = False
        """Whether the next attempt finds out if the failure of this one counts."""

    # --- reservations ---

    def follow(self, in_flight: InFlight, fingerprint: str, earlier: EarlierAttempts) -> None:
        """Follow the reservations that scheduling has opened for a request."""
        self._in_flight = in_flight
        self._fingerprint = fingerprint
        self._earlier_error = earlier.error
        self.token = in_flight.leg
        self._prefill, self._decode = in_flight.prefill_endpoint, in_flight.decode_endpoint
        self._endpoints = [each for each in (self._prefill, self._decode) if each is not None]
        self._answers = [each.health.successes for each in self._endpoints]
        if not earlier.failed:
            self._environment.budget.earn()

    @property
    def prefill_timeout(self) -> float:
        """Seconds from the pick after which prefill is given up."""
        expected = 0.0 if self._in_flight is None else self._in_flight.expected_prefill
        return self._environment.supervision.prefill_timeout_of(expected)

    def first_byte(self, status: int, served: str | None, now: float) -> None:
        """Note that the response headers have arrived, from *served* where the gateway reports it."""
        if self._in_flight is not None:
            self._in_flight.first_byte(status, now)
        if served is not None and self._decode is not None and served != self._decode.address:
            self._environment.listener.destination_mismatch()
            self._decode = None  # the outcome is that of another endpoint

    def prefill_answered(self, status: int, now: float) -> None:
        """Note that the prefill leg has answered."""
        if self._in_flight is not None:
            self._in_flight.prefill_answered(status, now)

    def end(self, now: float) -> None:
        """End all reservations."""
        if self._in_flight is not None:
            self._in_flight.end(now)

    # --- endpoint health ---

    def served(self, leg: Role) -> None:
        """Count a leg that was served."""
        endpoint = self._prefill if leg is Role.PREFILL else self._decode
        if endpoint is not None:
            endpoint.health.succeeded()
        if leg is Role.DECODE:
            self.count_earlier_error()

    @property
    def awaits_likeness(self) -> bool:
        """Whether it is not known yet if the failure of the attempt before counts."""
        return self._earlier_error is not None

    def count_earlier_error(self) -> None:
        """Count the failure of the attempt before, because this one does not fail alike."""
        if (error := self._earlier_error) is not None:
            self._earlier_error = None
            self._environment.decider.lost(error.address)

    def blame(self, failure: Failure, now: float) -> None:
        """Count a failure against the endpoint at fault, unless it may be that of the request."""
        endpoint = self._prefill if failure.leg is Role.PREFILL else self._decode
        if failure.is_lost and endpoint is not None:
            self._environment.decider.engine_lost(self._fingerprint, endpoint.address)
        if self._is_alike(failure):
            return
        if failure.is_clients_fault:
            self._earlier_error = None
        self.count_earlier_error()
        if self._is_put_off:
            return
        if failure.blame is Blame.BY_TEXT:
            accuses = self._prefill is not None and any(words in failure.text for words in _ACCUSATIONS[failure.leg])
            endpoint = self._prefill if (failure.leg is Role.PREFILL) != accuses else self._decode
            if endpoint is not None:
                endpoint.health.failed(now)
                self._environment.decider.suspect(endpoint.url)
        elif failure.blame in {Blame.OUTDATED, Blame.INACTIVE}:
            self._note_wrong_rank(failure, now)
        elif failure.blame is Blame.IF_SILENT:
            self._blame_silent(failure.leg, now)

    def _blame_silent(self, leg: Role, now: float) -> None:
        for endpoint, before in zip(self._endpoints, self._answers, strict=True):
            # Decode may delay prefill, but prefill does not delay a first token.
            concerned = leg in {Role.PREFILL, endpoint.role}
            if concerned and endpoint.health.successes == before:
                endpoint.health.failed(now)

    def _note_wrong_rank(self, failure: Failure, now: float) -> None:
        """Leave out a rank that is not active, and have the facts of an engine read that has not the rank at all."""
        endpoint = self._prefill if failure.leg is Role.PREFILL else self._decode
        if endpoint is None or self._in_flight is None:
            return
        reservations = self._in_flight.prefill if failure.leg is Role.PREFILL else self._in_flight.decode
        if failure.blame is Blame.INACTIVE and len(reservations) == 1:
            endpoint.leave_out(reservations[0].rank.index, now)
        self._environment.decider.contradicted(endpoint.url, failure.message)

    # --- retry budget and listener ---

    def attempt_lost(self, address: str, attempts: int) -> bool:
        """Count an attempt that an endpoint has dropped, and that Envoy has repeated by itself.

        Returns:
            Whether the retry budget allows the present attempt.
        """
        self._environment.decider.lost(address)
        return self._report_failure(Role.DECODE, Reason.DECODE_FAILED, attempts)

    def retry_headers(self, failure: Failure, attempts: int) -> Headers:
        """Take a retry from the budget.

        Returns:
            The headers by which the bundled Envoy schedules the request again; none if the client gets the error.
        """
        if self._is_alike(failure):
            self._environment.listener.leg_failed(LegFailed(failure.leg, Reason.FAILED_ALIKE, retried=False))
            return ()
        if not self._report_failure(failure.leg, failure.reason, attempts):
            return ()
        endpoint, mark = self._prefill if failure.leg is Role.PREFILL else self._decode, ""
        if endpoint is not None and failure.is_lost:
            mark = contract.write_lost(endpoint.address)
        elif endpoint is not None and failure.signature:
            mark = contract.write_error(EngineError(endpoint.address, failure.signature))
            self._is_put_off = True
        addresses = (each.address for each in self._endpoints)
        return ((contract.RETRY, b"1"), (contract.FAILED, contract.write_failed(*addresses, mark=mark)))

    def _is_alike(self, failure: Failure) -> bool:
        """Return whether another engine has answered the attempt before with the same error."""
        error = self._earlier_error
        endpoint = self._prefill if failure.leg is Role.PREFILL else self._decode
        is_other = error is not None and endpoint is not None and endpoint.address != error.address
        return is_other and error is not None and error.signature == failure.signature

    def _report_failure(self, leg: Role, reason: Reason, attempts: int) -> bool:
        """Report the failure of a leg, and return whether a retry could be taken from the budget."""
        retried = self._environment.budget.spend(attempts)
        self._environment.listener.leg_failed(LegFailed(leg, reason, retried))
        return retried

    def decided(self, outcome: str, since: float) -> None:
        """Report the outcome of a decision that began at *since*."""
        self._environment.listener.decided(Decided(outcome, self._environment.clock() - since))

    def leg_missing(self) -> None:
        """Report that the prefill leg has not opened in time."""
        self._environment.listener.leg_missing()

    def held(self, seconds: float, *, in_vain: bool) -> None:
        """Report for how long response headers were held, and whether prefill is still awaited."""
        self._environment.listener.held(seconds, in_vain=in_vain)

    def responses_skipped(self) -> None:
        """Report that the gateway has ended the stream before the response."""
        self._environment.listener.responses_skipped()
