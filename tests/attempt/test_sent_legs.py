"""Attempts whose prefill leg the service sends: what is commanded at each event, in each kind of gateway."""

from typing import Any, Final

import pytest

from attempt.attempts import make_environment
from dp_extproc.attempt.attempt import UNHEARD_SECONDS, Attempt
from dp_extproc.attempt.events import (
    BodyMode,
    Command,
    Continue,
    Event,
    Immediate,
    LegBody,
    LegClosed,
    LegHeaders,
    LegOpened,
    LegUnseen,
    MainClosed,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    SendLeg,
    StreamedChunk,
    ToLeg,
)
from dp_extproc.attempt.gateways import BundledEnvoy, EndpointPicker, Peer
from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.scheduling.decision import LegAbort
from dp_extproc.scheduling.encoder import LegSettings
from extproc.wire import Watcher
from fleet_fixtures import Fleet, make_facts

HEADERS: Final = {
    ":method": "POST", ":path": "/generate?a=b", "content-type": "application/json",
    "authorization": "Bearer client", "traceparent": "00-1-2-01", "x-request-id": "my\nid",
    "x-override-rid": "evil", "x-gateway-destination-endpoint": "6.6.6.6:6",
}  # fmt: skip
STREAM: Final = b'{"text":"hello","stream":true}'
PLAIN: Final = b'{"text":"hello"}'
HOLD: Final = 0.2
EVENT: Final = b'data: {"text":"a"}\n\n'
ERROR: Final = b'data: {"error":{"message":"broken","code":500}}\n\n'


class Sent:
    """A request that was routed to the only pair of endpoints."""

    def __init__(
        self,
        body: bytes = STREAM,
        *,
        response: BodyMode = BodyMode.NONE,
        hears: bool = True,
        mode: Supervise = Supervise.FIRST_EVENT,
        bundled: bool = False,
    ) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        self.watcher = Watcher()
        self.peer = Peer(sends_responses=hears)
        environment = make_environment(
            self.fleet.make_scheduler(legs=LegSettings(sends_prefill=True)),
            gateway=BundledEnvoy() if bundled else EndpointPicker(hold=HOLD),
            listener=self.watcher,
            supervision=SupervisionSettings.model_validate({"mode": mode.value, "prefill_timeout": "20s"}),
        )
        self.attempt = Attempt(environment, BodyMode.DUPLEX, response, None, self.peer)
        assert self.do(RequestHeaders(HEADERS, False)) == []
        self.routed = self.do(RequestBody(body, True))

    def do(self, event: Event, now: float = 0.0) -> list[Command]:
        return self.attempt.receive(event, now)

    def shown(self, event: Event | None, now: float = 0.0) -> list[str]:
        """Name the commands that follow."""
        commands = self.attempt.advance(now) if event is None else self.do(event, now)
        return [_word(each) for each in commands]

    @property
    def reservations(self) -> int:
        return sum(self.fleet.endpoint(role).reservations for role in (Role.PREFILL, Role.DECODE))


def _word(command: Command) -> str:
    match command:
        case ToLeg():
            return command.name
        case Continue():
            return "continue"
        case Immediate():
            return str(command.status)
        case StreamedChunk():
            return command.data.decode()
        case LegAbort():
            return "abort"
        case _:
            raise AssertionError(command)


def test_leg_is_sent_before_the_reply_is_written() -> None:
    """With the rest of the decode leg's body, the path of the client, and no header but those that go along."""
    sent = Sent()
    first, *replies = sent.routed
    body = b"".join(each.data for each in replies if isinstance(each, StreamedChunk))

    assert isinstance(first, SendLeg)
    assert body.endswith(bytes(first.request.tail))
    assert first.request.preamble.endswith(b'"stream":false,')
    assert first.path == "/generate?a=b"
    assert dict(first.headers) == {"authorization": b"Bearer client", "traceparent": b"00-1-2-01"}
    assert first.request.address == sent.fleet.endpoint(Role.PREFILL).address
    assert not any(name.startswith("x-dp-") for each in replies for name, _ in getattr(each, "set_headers", ()))


ANSWERED: Final = LegHeaders(200, end_of_stream=True)


@pytest.mark.parametrize("response", [BodyMode.NONE, BodyMode.LOCKSTEP])
def test_headers_are_held_until_prefill_has_answered(response: BodyMode) -> None:
    """No first event is awaited, where none is seen."""
    sent = Sent(response=response)
    assert sent.shown(LegOpened()) == ["PROCEED"]
    assert sent.shown(ResponseHeaders(200), 1.0) == []
    commands = sent.do(ANSWERED, 1.1)

    assert len(commands) == 2
    assert sent.watcher.holds == [False]


def test_headers_are_held_no_longer_than_the_gateway_waits() -> None:
    """A failure after that ends decode by its id, and reaches the client as the end of its stream."""
    sent = Sent()
    sent.do(ResponseHeaders(200), 1.0)
    assert sent.attempt.main.hold_ends_at == 1.0 + HOLD
    assert sent.shown(None, 1.0 + HOLD) == []
    assert sent.shown(None, 1.01 + HOLD) == ["continue"]
    assert sent.watcher.holds == [True]

    assert sent.shown(LegClosed("refused"), 2.0) == ["abort"]
    assert sent.shown(MainClosed(), 3.0) == []
    assert sent.reservations == 0


class TestEvents:
    """In full duplex the pieces of the response come here, and wait behind its headers."""

    def test_pieces_follow_the_headers_in_order(self) -> None:
        """The first event and the prefill leg are awaited, in either order, and for longer than elsewhere."""
        sent = Sent(response=BodyMode.DUPLEX)
        assert sent.attempt.main.hold_ends_at == float("inf")
        assert sent.shown(ResponseHeaders(200), 1.0) == []
        assert sent.shown(ResponseBody(EVENT, False), 1.0) == []
        assert sent.shown(None, 19.0) == []
        assert sent.shown(ANSWERED, 19.0) == ["PROCEED", "continue", EVENT.decode()]
        assert sent.shown(ResponseBody(b"more", False), 19.1) == ["more"]

    def test_error_in_the_first_event_is_an_error(self) -> None:
        """Nothing of the response has gone to the client."""
        sent = Sent(response=BodyMode.DUPLEX)
        sent.do(ResponseHeaders(200), 1.0)
        sent.do(ANSWERED, 1.0)

        assert sent.shown(ResponseBody(ERROR, False), 1.1) == ["502"]

    def test_failure_of_prefill_drops_the_pieces(self) -> None:
        """The client gets an error instead."""
        sent = Sent(response=BodyMode.DUPLEX)
        sent.do(ResponseHeaders(200), 1.0)
        sent.do(ResponseBody(EVENT, False), 1.0)

        assert sent.shown(LegClosed("cut"), 1.1) == ["502"]


FAILURES: Final[dict[str, tuple[list[Event], str]]] = {
    "not reached": ([LegClosed("the prefill server was not reached: refused")], "502"),
    "5xx": ([LegHeaders(500), LegBody(b"{}", True)], "502"),
    "4xx": ([LegHeaders(422), LegBody(b"{}", True)], "422"),
}


@pytest.mark.parametrize("mode", [Supervise.OFF, Supervise.LEGS])
@pytest.mark.parametrize(("events", "status"), FAILURES.values(), ids=FAILURES)
def test_failure_of_prefill_answers_the_client(mode: Supervise, events: list[Event], status: str) -> None:
    """Also where the legs are not supervised: only this process has seen the failure."""
    sent = Sent(PLAIN, mode=mode)
    (*_, last) = [sent.do(event, 1.0) for event in events]
    (answer,) = [each for each in last if isinstance(each, Immediate)]

    assert str(answer.status) == status
    assert dict(answer.headers).get("retry-after") == ("0" if status == "502" else None)
    assert sent.watcher.failures or status != "502"


def test_leg_that_runs_unseen_releases_the_response() -> None:
    """The engine has it, and its response is lost."""
    sent = Sent()
    sent.do(ResponseHeaders(200), 1.0)

    assert sent.shown(LegUnseen(), 1.1) == ["continue"]
    assert sent.watcher.unseen == 1
    assert sent.shown(LegClosed(), 1.1) == []


@pytest.mark.parametrize("bundled", [True, False])
def test_leaving_client_cancels_the_leg(bundled: bool) -> None:
    """At once, with no reservation left."""
    sent = Sent(bundled=bundled)

    assert sent.shown(MainClosed(), 1.0) == ["CANCEL"]
    assert sent.reservations == 0
    assert sent.attempt.is_over(1.0)


@pytest.mark.parametrize("status", [404, 500])
def test_error_of_decode_cancels_the_leg(status: int) -> None:
    """The client gets it as it is where its text cannot be read."""
    assert Sent().shown(ResponseHeaders(status, is_encoded=True), 1.0) == ["continue", "CANCEL"]


class TestUnheard:
    """A gateway that has never sent response headers ends its stream once the request has passed."""

    def test_leg_goes_on_and_releases_both_reservations(self) -> None:
        """Decode's a while later, when the engine's own load has it."""
        sent = Sent(hears=False)
        assert sent.shown(MainClosed(), 1.0) == []
        assert sent.watcher.skipped == 1
        assert sent.reservations == 2
        assert not sent.attempt.is_over(1.0)
        assert sent.shown(ANSWERED, 2.0) == ["PROCEED"]
        assert sent.reservations == 1
        assert sent.shown(None, 2.1 + UNHEARD_SECONDS) == []
        assert sent.reservations == 0
        assert sent.attempt.is_over(5.0)

    def test_decode_stays_reserved_if_prefill_ends_first(self) -> None:
        """The end of the gateway's stream is not the end of the decode leg."""
        sent = Sent(hears=False)
        sent.do(ANSWERED, 1.0)
        sent.do(LegClosed(), 1.0)

        assert sent.shown(MainClosed(), 1.1) == []
        assert (sent.watcher.skipped, sent.reservations) == (1, 1)
        assert sent.shown(None, 1.1 + UNHEARD_SECONDS) == []
        assert sent.reservations == 0
        assert sent.attempt.is_over(5.0)

    @pytest.mark.parametrize("event", [LegClosed("cut"), LegHeaders(500, end_of_stream=True)])
    def test_failure_of_prefill_ends_decode_by_its_id(self, event: Any) -> None:
        """The client hears nothing else."""
        sent = Sent(hears=False)
        sent.do(MainClosed(), 1.0)

        assert sent.shown(event, 2.0)[-1] == "abort"
        assert sent.reservations == 0
        assert sent.attempt.is_over(2.0)

    def test_silent_leg_is_given_up_in_time(self) -> None:
        """Its connection is closed, and decode ends."""
        sent = Sent(hears=False)
        sent.do(MainClosed(), 1.0)

        assert sorted(sent.shown(None, 21.0)) == ["CANCEL", "abort"]
        assert sent.reservations == 0
        assert sent.attempt.deadline == float("inf")

    def test_answer_that_may_be_ignored_is_followed_by_an_abort(self) -> None:
        """The stream may be over for the gateway already."""
        assert sorted(Sent(hears=False).shown(LegClosed("cut"), 1.0)) == ["502", "abort"]

    def test_response_headers_show_how_a_gateway_is_set(self) -> None:
        """From then on the end of a stream means that the client has left."""
        sent = Sent(hears=False)
        sent.do(ResponseHeaders(200), 1.0)

        assert sent.peer.sends_responses
