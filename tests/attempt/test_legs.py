"""Both legs of an attempt, step by step: the commands for each stream, and the endpoint that is blamed."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from attempt.attempts import make_environment
from dp_extproc import contract
from dp_extproc.attempt.attempt import Attempt
from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Command,
    CommentRead,
    Continue,
    Event,
    ExtendTimeout,
    FirstEventRead,
    Immediate,
    LegBody,
    LegClosed,
    LegHeaders,
    LegOpened,
    MainClosed,
    Mutate,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    StreamBody,
    ToLeg,
)
from dp_extproc.attempt.failures import Blame, engine_error
from dp_extproc.attempt.intake import Decider
from dp_extproc.config.reliability import RetrySettings, Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason
from dp_extproc.response.first_event import EngineError
from dp_extproc.scheduling.decision import Decision, RequestContext, SchedulingResult
from extproc.wire import Watcher
from fleet_fixtures import Fleet, make_facts

CHAT = b'{"messages":[{"role":"user","content":"hello"}],"stream":true}'
PLAIN = CHAT.replace(b"true", b"false")
HEADERS = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json"}
SETTINGS = {"prefill_timeout": "100s", "first_token_timeout": "10s"}
CANCELLED = "cancelled"
LET_GO = [("MAIN", "continue")]
Say = tuple[str, Command]
"""Which leg's stream it is for, and what is said."""
OF_LEGS = {
    ToLeg.PROCEED: "continue",
    ToLeg.BUFFER_BODY: "take body",
    ToLeg.STREAM_BODY: "see body",
    ToLeg.CANCEL: CANCELLED,
}


class Attempted:
    """A request that was routed to the only pair of endpoints, and the events of its streams."""

    def __init__(
        self,
        mode: Supervise = Supervise.FIRST_EVENT,
        body: bytes = CHAT,
        *,
        failed: str | None = None,
        retry: RetrySettings | None = None,
        duplex: bool = False,
        unread: bool = False,
    ) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        self.watcher = Watcher()
        self.watch = Watch(
            _Unread(self.fleet.scheduler) if unread else self.fleet.scheduler,
            BodyMode.DUPLEX if duplex else BodyMode.LOCKSTEP,
            SupervisionSettings.model_validate({"mode": mode.value, **SETTINGS}),
            retry,
            self.watcher,
        )
        self.exchange = self.watch
        self.watch.tell(RequestHeaders(HEADERS | ({contract.AVOID: failed} if failed else {}), False), 0.0)
        self.watch.tell(RequestBody(body, True), 0.0)
        assert self.watch.attempt.main.is_routed

    @property
    def failures(self) -> list[tuple[Role, Reason, bool]]:
        return self.watcher.failures

    @property
    def unseen(self) -> int:
        return self.watcher.unseen

    def head(self, status: int = 200, now: float = 1.0, *, has_body: bool = True, is_events: bool = False) -> list[Say]:
        """The decode server's head comes."""
        return self.watch.tell(ResponseHeaders(status, end_of_stream=not has_body, is_events=is_events), now)

    def prefill(
        self, status: int = 200, now: float = 1.0, *, has_body: bool = True, is_events: bool = False
    ) -> list[Say]:
        """The prefill server's head comes."""
        return self.watch.tell(LegHeaders(status, end_of_stream=not has_body, is_events=is_events), now)

    def blamed(self) -> list[Role]:
        """Name the legs whose endpoint has a failure on record."""
        roles = (Role.PREFILL, Role.DECODE)
        return [role for role in roles if self.fleet.endpoint(role).health.failures]


class Watch:
    """Events of an attempt as methods, each of which gives the commands that follow."""

    def __init__(
        self,
        decider: Decider,
        mode: BodyMode,
        supervision: SupervisionSettings,
        retry: RetrySettings | None,
        watcher: Watcher,
    ) -> None:
        environment = make_environment(decider, listener=watcher, supervision=supervision, retry=retry)
        self._budget = environment.budget
        self.attempt = Attempt(environment, mode, BodyMode.LOCKSTEP)

    def tell(self, event: Event, now: float) -> list[Say]:
        return _said(self.attempt.receive(event, now))

    def receive(self, event: ResponseBody) -> None:
        """Ignore the text of an error, which :meth:`decode_explained` reports."""

    def prefill_opened(self) -> list[Say]:
        return self.tell(LegOpened(), 0.0)

    def prefill_explained(self, body: bytes, now: float, *, end_of_stream: bool = True) -> list[Say]:
        return self.tell(LegBody(body, end_of_stream), now)

    def prefill_closed(self, now: float) -> list[Say]:
        return self.tell(LegClosed(), now)

    def decode_explained(self, body: bytes, now: float) -> list[Say]:
        return self.tell(ResponseBody(body, True), now)

    def first_event(self, error: EngineError | None, now: float) -> list[Say]:
        return self.tell(FirstEventRead(error), now)

    def closed(self, now: float) -> list[Say]:
        return self.tell(MainClosed(), now)

    def sweep(self, now: float) -> list[Say]:
        return _said(self.attempt.advance(now))

    @property
    def awaits_prefill(self) -> bool:
        return self.attempt.leg.may_open


class _Unread:
    """Schedules requests as if their bodies had not been read."""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decider, name)

    def place(self, api: Api, body: bytes, context: RequestContext) -> SchedulingResult:
        placed = self._decider.place(api, body, context)
        return replace(placed, streaming=None) if isinstance(placed, Decision) else placed


def _said(commands: list[Command]) -> list[Say]:
    return [("PREFILL" if isinstance(command, ToLeg) else "MAIN", command) for command in commands]


def show(said: Sequence[Say]) -> list[tuple[str, str]]:
    """What was said, in words."""
    return [(stream, _word(command)) for stream, command in said]


def _word(reply: Command) -> str:
    match reply:
        case ToLeg():
            return OF_LEGS[reply]
        case Continue():
            return "continue"
        case BufferBody():
            return "take body"
        case StreamBody():
            return "see body"
        case ExtendTimeout():
            return "extend"
        case Immediate():
            return f"{reply.status} {reply.details}"
        case Mutate():
            return " ".join(sorted(name for name, _ in reply.set_headers))
        case _:
            raise AssertionError(reply)


def main_of(said: Sequence[Say]) -> Any:
    """The one thing said on the main stream."""
    (reply,) = [reply for stream, reply in said if stream == "MAIN"]
    return reply


class TestCommit:
    """When the answer's head goes to the client."""

    def test_response_is_committed_after_prefill_and_the_first_event(self) -> None:
        """A stream needs both; the order does not matter."""
        attempted = Attempted()
        assert show(attempted.watch.prefill_opened()) == [("PREFILL", "continue")]
        assert attempted.head() == []
        assert show(attempted.prefill()) == [("PREFILL", "continue")]
        assert show(attempted.watch.first_event(None, 2.0)) == LET_GO

    def test_response_is_committed_when_the_first_event_precedes_prefill(self) -> None:
        """/generate begins with 200 at once, and prefill's status is known later."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert attempted.watch.first_event(None, 1.0) == []
        assert attempted.head() == []
        assert show(attempted.prefill()) == [("PREFILL", "continue"), *LET_GO]

    @pytest.mark.parametrize(("mode", "body"), [(Supervise.LEGS, CHAT), (Supervise.FIRST_EVENT, PLAIN)])
    def test_response_is_committed_after_prefill_when_no_event_is_awaited(self, mode: Supervise, body: bytes) -> None:
        """A whole answer, or the cheaper degree: prefill alone decides."""
        attempted = Attempted(mode, body)
        attempted.watch.prefill_opened()
        attempted.prefill()
        assert show(attempted.head()) == LET_GO

    def test_switched_off(self) -> None:
        """Nothing is held."""
        attempted = Attempted(Supervise.OFF)
        assert show(attempted.head()) == LET_GO

    def test_comments_are_committed_once_prefill_has_answered(self) -> None:
        """They keep the connection of a waiting client alive."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert attempted.watch.tell(CommentRead(), 1.0) == []
        assert attempted.head(now=1.0) == []
        assert show(attempted.prefill(now=2.0)) == [("PREFILL", "continue"), *LET_GO]

    def test_an_error_behind_comments_is_a_clean_error_until_prefill_has_answered(self) -> None:
        """A comment is no first event."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head(now=1.0)
        assert attempted.watch.tell(CommentRead(), 1.0) == []
        error = EngineError(500, b"{}")
        assert show(attempted.watch.first_event(error, 2.0))[0] == ("MAIN", "502 decode_failed")

    def test_an_encoded_stream_is_not_held_for_its_first_event(self) -> None:
        """It cannot be read, so prefill alone decides."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert show(attempted.prefill()) == [("PREFILL", "continue")]
        head = ResponseHeaders(200, is_events=True, is_encoded=True)
        assert show(attempted.watch.tell(head, 1.0)) == LET_GO
        assert attempted.watch.sweep(500.0) == []
        assert attempted.blamed() == []

    def test_response_is_committed_without_a_leg_that_does_not_open(self) -> None:
        """It may run all the same, out of sight; this is counted."""
        attempted = Attempted(body=PLAIN)
        assert attempted.head(now=1.0) == []
        assert attempted.watch.sweep(2.5) == []
        assert show(attempted.watch.sweep(3.5)) == LET_GO
        assert attempted.unseen == 1

    def test_timeout_of_envoy_is_extended_once(self) -> None:
        """Its own patience is 20 s."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head(now=1.0)
        assert attempted.watch.sweep(2.0) == []
        assert show(attempted.watch.sweep(7.0)) == [("MAIN", "extend")]
        assert attempted.watch.sweep(8.0) == []


EVENT = b'data: {"choices":[]}\n\n'
BROKEN = b'data: {"error":{"message":"bootstrap failed","code":500}}\n\n'
REFUSED = b'data: {"error":{"message":"too long","code":400}}\n\n'
GO_ON = [("PREFILL", "continue")]


class TestUnread:
    """The body was not seen: whether it asks for a stream shows with the answers, and then prefill streams, too."""

    def _opened(self, mode: Supervise = Supervise.FIRST_EVENT) -> Attempted:
        attempted = Attempted(mode, unread=True)
        attempted.watch.prefill_opened()
        return attempted

    def test_whole_response_is_committed_without_a_first_event(self) -> None:
        """It has no first event to wait for, and no time for one."""
        attempted = self._opened()
        assert show(attempted.prefill(now=1.0)) == GO_ON
        assert attempted.watch.sweep(99.0) == []
        assert show(attempted.head(now=99.0)) == LET_GO

    @pytest.mark.parametrize("prefill_first", [True, False])
    def test_a_stream(self, prefill_first: bool) -> None:
        """Both legs' first events are needed: their heads come before anything was done."""
        attempted = self._opened()
        assert attempted.head(is_events=True) == []
        assert show(attempted.prefill(is_events=True)) == [("PREFILL", "see body")]
        assert attempted.fleet.endpoint(Role.PREFILL).reservations
        if prefill_first:
            assert show(attempted.watch.prefill_explained(EVENT, 2.0, end_of_stream=False)) == GO_ON
            assert not attempted.fleet.endpoint(Role.PREFILL).reservations
            assert show(attempted.watch.first_event(None, 2.0)) == LET_GO
        else:
            assert attempted.watch.first_event(None, 2.0) == []
            assert show(attempted.watch.prefill_explained(EVENT, 2.0, end_of_stream=False)) == [*GO_ON, *LET_GO]
        assert show(attempted.watch.prefill_explained(b"data: [DONE]\n\n", 2.0)) == GO_ON
        assert attempted.watch.prefill_closed(3.0) == []

    def test_first_event_of_prefill_is_read_in_pieces(self) -> None:
        """It is known when it is whole, or when nothing follows."""
        attempted = self._opened()
        attempted.head()
        attempted.prefill(is_events=True)
        assert show(attempted.watch.prefill_explained(EVENT[:5], 2.0, end_of_stream=False)) == GO_ON
        assert show(attempted.watch.prefill_explained(EVENT[5:], 2.0, end_of_stream=False)) == [*GO_ON, *LET_GO]

    @pytest.mark.parametrize("mode", [Supervise.LEGS, Supervise.FIRST_EVENT])
    def test_prefill_fails_when_its_first_event_is_an_error(self, mode: Supervise) -> None:
        """As if the status had said so."""
        attempted = self._opened(mode)
        attempted.head(is_events=True)
        attempted.prefill(is_events=True)
        said = attempted.watch.prefill_explained(BROKEN, 2.0, end_of_stream=False)
        assert show(said) == [*GO_ON, ("MAIN", "502 prefill_failed")]
        assert b"bootstrap failed" in main_of(said).body
        assert attempted.blamed() == [Role.PREFILL]

    def test_client_gets_the_engines_error_when_prefill_refuses_in_its_first_event(self) -> None:
        """The client's own fault passes as the engine wrote it."""
        attempted = self._opened()
        attempted.prefill(is_events=True)
        said = attempted.watch.prefill_explained(REFUSED, 2.0)
        assert show(said) == [*GO_ON, ("MAIN", "400 engine_refused")]

    def test_prefill_fails_when_it_is_cut_before_its_first_event(self) -> None:
        """Its head has said nothing."""
        attempted = self._opened()
        attempted.prefill(is_events=True)
        assert show(attempted.watch.prefill_closed(2.0)) == [("MAIN", "502 prefill_failed")]

    def test_prefill_times_out_until_its_first_event(self) -> None:
        """Its time runs until the first event."""
        attempted = self._opened()
        attempted.prefill(is_events=True)
        assert show(attempted.watch.sweep(101.0)) == [("MAIN", "504 prefill_timeout"), ("PREFILL", CANCELLED)]

    def test_first_token_times_out_when_the_response_is_a_stream(self) -> None:
        """The timeout counts once the headers report a stream."""
        attempted = self._opened()
        attempted.head(is_events=True)
        attempted.prefill(is_events=True)
        attempted.watch.prefill_explained(EVENT, 2.0, end_of_stream=False)
        assert show(attempted.watch.sweep(13.0)) == [("MAIN", "504 first_token_timeout")]

    def test_switched_off(self) -> None:
        """Nothing is held, and the reservation of prefill ends with its first event."""
        attempted = Attempted(Supervise.OFF, unread=True)
        assert show(attempted.head(is_events=True)) == LET_GO
        attempted.prefill(is_events=True)
        assert attempted.fleet.endpoint(Role.PREFILL).reservations
        assert show(attempted.watch.prefill_explained(EVENT, 2.0)) == GO_ON
        assert not attempted.fleet.endpoint(Role.PREFILL).reservations


class TestFailures:
    """One leg fails: the other one ends, and the client gets another attempt or a clean error."""

    def test_prefill_fails(self) -> None:
        """Its text is read first, for the blame and for the message."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head()
        assert show(attempted.prefill(500)) == [("PREFILL", "take body")]
        said = attempted.watch.prefill_explained(b"out of memory", 1.0)
        reply = main_of(said)
        assert (reply.status, reply.details) == (502, "prefill_failed")
        assert b"out of memory" in reply.body
        assert dict(reply.headers)[contract.RETRY] == "1"
        assert [*map(sorted, contract.read_failed(dict(reply.headers)[contract.FAILED]))] == [
            ["10.0.0.1:31001", "10.0.0.1:32001"]
        ]
        assert attempted.blamed() == []  # the next attempt may fail alike
        assert attempted.failures == [(Role.PREFILL, Reason.PREFILL_FAILED, True)]

    @pytest.mark.parametrize("answered", [False, True])
    def test_prefill_is_cut(self, answered: bool) -> None:
        """Its stream closes without an answer, or before the error's text."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        if answered:
            attempted.prefill(503)
        assert show(attempted.watch.prefill_closed(1.0)) == [("MAIN", "502 prefill_failed")]

    def test_prefill_ends_after_its_success(self) -> None:
        """As it always does."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill()
        assert attempted.watch.prefill_closed(1.0) == []

    def test_decode_fails(self) -> None:
        """The engine's own error goes on, with the word that the front door understands; prefill is ended."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert show(attempted.head(500)) == [("MAIN", "take body")]
        attempted.exchange.receive(ResponseBody(b"oops", True))
        said = attempted.watch.decode_explained(b"oops", 1.0)
        assert show(said) == [("MAIN", f"{contract.FAILED} {contract.RETRY}"), ("PREFILL", CANCELLED)]
        assert main_of(said).phase is Phase.RESPONSE_BODY
        assert attempted.blamed() == []  # the next attempt may fail alike

    def test_decode_fails_at_once_without_a_body(self) -> None:
        """There is nothing to wait for."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert show(attempted.head(503, has_body=False)) == [
            ("MAIN", f"{contract.FAILED} {contract.RETRY}"),
            ("PREFILL", CANCELLED),
        ]

    def test_decode_fails_at_once_in_duplex(self) -> None:
        """Envoy would not send the text, so it is not waited for; it goes to the client, or another attempt is made."""
        attempted = Attempted(duplex=True)
        attempted.watch.prefill_opened()
        said = attempted.head(500)
        assert show(said) == [("MAIN", f"{contract.FAILED} {contract.RETRY}"), ("PREFILL", CANCELLED)]
        assert main_of(said).phase is Phase.RESPONSE_HEADERS
        assert attempted.blamed() == []  # the next attempt may fail alike
        assert attempted.failures == [(Role.DECODE, Reason.DECODE_FAILED, True)]

    def test_decode_fails_when_its_first_event_is_an_error(self) -> None:
        """The 200 before it was not let go, so this is a failure like any other."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head()
        said = attempted.watch.first_event(EngineError(500, b'{"error":{"message":"transfer failed"}}'), 1.0)
        assert show(said) == [("MAIN", "502 decode_failed"), ("PREFILL", CANCELLED)]
        assert b"transfer failed" in main_of(said).body

    @pytest.mark.parametrize("leg", [Role.PREFILL, Role.DECODE])
    @pytest.mark.parametrize(
        ("first", "second", "is_alike"),
        [
            (b"AttributeError: 'list' object, rid=dp0a1", b"AttributeError: 'list' object, rid=dp99ff", True),
            (b"Internal Server Error", b"Internal Server Error", True),
            (b"Internal Server Error", b"out of memory", False),
        ],
    )
    def test_errors_alike_of_two_engines_count_against_neither(
        self, leg: Role, first: bytes, second: bytes, *, is_alike: bool
    ) -> None:
        """They are the fault of the request, which is not tried a third time."""
        mark = contract.write_error(contract.EngineError("10.0.0.9:30000", _signature_of(first)))
        attempted = Attempted(failed=contract.write_failed("10.0.0.8:30000", "10.0.0.9:30000", mark=mark).decode())
        lost: list[str] = []
        attempted.fleet.scheduler.lost = lost.append  # type: ignore[method-assign, assignment]
        said = _explained(attempted, leg, second)
        reply = main_of([each for each in said if each[0] == "MAIN"])
        headers = dict(reply.headers if isinstance(reply, Immediate) else reply.set_headers)

        assert lost == ([] if is_alike else ["10.0.0.9:30000"])
        assert (contract.RETRY in headers) == (not is_alike)
        assert attempted.blamed() == []
        reason = Reason.PREFILL_FAILED if leg is Role.PREFILL else Reason.DECODE_FAILED
        assert attempted.failures == [(leg, Reason.FAILED_ALIKE if is_alike else reason, not is_alike)]

    @pytest.mark.parametrize("answers", [True, False])
    def test_error_of_the_attempt_before_counts_if_this_one_does_not_fail_alike(self, *, answers: bool) -> None:
        """It counts when the response is good, or when an error alike would have come."""
        mark = contract.write_error(contract.EngineError("10.0.0.9:30000", _signature_of(b"oops")))
        attempted = Attempted(failed=contract.write_failed("10.0.0.8:30000", "10.0.0.9:30000", mark=mark).decode())
        lost: list[str] = []
        attempted.fleet.scheduler.lost = lost.append  # type: ignore[method-assign, assignment]
        attempted.watch.prefill_opened()
        if answers:
            attempted.prefill()
            attempted.head(has_body=False)
            attempted.watch.first_event(None, 1.0)
        else:
            attempted.watch.sweep(1.0)
            assert lost == []
            attempted.watch.sweep(3.0)

        assert lost == ["10.0.0.9:30000"]

    @pytest.mark.parametrize(
        ("leg", "text", "guilty"),
        [
            (Role.PREFILL, b"Decode instance could be dead, remote mooncake session x is not alive", Role.DECODE),
            (Role.DECODE, b"Lost connection with prefill instance (bootstrap_addr: x)", Role.PREFILL),
            (Role.DECODE, b"Decode handshake failed for request", Role.PREFILL),
            (Role.DECODE, b"Request 5 timed out after 300.1s in KVPoll.WaitingForInput", Role.PREFILL),
            (Role.PREFILL, b"whatever", Role.PREFILL),
            (Role.DECODE, b"whatever", Role.DECODE),
        ],
    )
    def test_endpoint_is_blamed_by_the_text_of_the_error(self, leg: Role, text: bytes, guilty: Role) -> None:
        """The engine of the failed leg is blamed, unless its text accuses the peer."""
        attempted = Attempted(retry=RetrySettings(attempts=1))
        attempted.watch.prefill_opened()
        if leg is Role.PREFILL:
            attempted.prefill(500)
            attempted.watch.prefill_explained(text, 1.0)
        else:
            attempted.head(500)
            attempted.watch.decode_explained(text, 1.0)
        assert attempted.blamed() == [guilty]

    @pytest.mark.parametrize("status", [400, 404, 422, 429])
    def test_client_gets_the_engines_error_when_prefill_refuses(self, status: int) -> None:
        """Decode may wait for minutes for what prefill has refused."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill(status)
        reply = main_of(attempted.watch.prefill_explained(b'{"error":"too long"}', 1.0))
        assert (reply.status, reply.body) == (status, b'{"error":"too long"}')
        assert contract.RETRY not in dict(reply.headers)
        assert attempted.blamed() == []
        assert attempted.failures == []

    @pytest.mark.parametrize("status", [400, 404, 429])
    def test_client_gets_an_error_of_decode_after_its_text_was_read(self, status: int) -> None:
        """It may be about the rank, which is no fault of the client, and it gets the member that clients read."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert show(attempted.head(status)) == [("MAIN", "take body"), ("PREFILL", CANCELLED)]
        said = attempted.watch.decode_explained(b'{"message":"max_tokens is too large"}', 1.0)
        assert show(said) == [("MAIN", "content-length content-type")]
        assert msgspec.json.decode(main_of(said).body)["error"]["message"] == "max_tokens is too large"
        assert attempted.blamed() == []

    def test_error_of_decode_without_its_text_is_answered_after_two_seconds(self) -> None:
        """The client gets the status all the same, and a message that names what is missing."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head(400, now=1.0)
        assert attempted.watch.sweep(2.9) == []
        said = attempted.watch.sweep(3.1)
        assert show(said) == [("MAIN", "400 engine_refused")]
        assert b"did not arrive in 2 s" in main_of(said).body
        assert attempted.failures == []

    @pytest.mark.parametrize("leg", [Role.PREFILL, Role.DECODE])
    def test_refused_rank_is_scheduled_again_and_is_no_fault_of_the_endpoint(self, leg: Role) -> None:
        """Another engine is behind the address, so its facts are read anew; the client gets no routing field."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        text = b'{"error":{"message":"routed_dp_rank=3 out of range [0, 2)"}}'
        if leg is Role.PREFILL:
            attempted.prefill(400)
            reply = main_of(attempted.watch.prefill_explained(text, 1.0))
            assert (reply.status, dict(reply.headers)[contract.RETRY]) == (502, "1")
            assert b"routed_dp_rank" not in reply.body
        else:
            attempted.head(400)
            said = attempted.watch.decode_explained(text, 1.0)
            assert {contract.FAILED, contract.RETRY} <= dict(main_of(said).set_headers).keys()
            assert b"routed_dp_rank" not in main_of(said).body
        assert attempted.blamed() == []
        assert [each for each, _, retried in attempted.failures if retried] == [leg]

    @pytest.mark.parametrize(("status", "blame"), [(400, Blame.OUTDATED), (500, Blame.INACTIVE)])
    def test_rank_is_left_out_unless_the_text_may_be_the_clients(self, status: int, blame: Blame) -> None:
        """A chat template of the client that raises an exception chooses the text of a 400."""
        text = b'{"error":{"message":"DP rank 0 is not active."}}'
        assert engine_error(Role.DECODE, status, text, "").blame is blame

    def test_client_gets_the_engines_status_when_decode_refuses_in_its_first_event(self) -> None:
        """It becomes the status that it should have been."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head()
        said = attempted.watch.first_event(EngineError(400, b"{}"), 1.0)
        assert show(said) == [("MAIN", "400 engine_refused"), ("PREFILL", CANCELLED)]

    def test_first_failure_decides_when_both_legs_fail(self) -> None:
        """The first failure decides; the second one has no effect."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head()
        attempted.prefill(500)
        attempted.watch.prefill_explained(b"", 1.0)
        assert attempted.watch.first_event(EngineError(500, b""), 1.0) == []
        assert attempted.watch.closed(1.0) == []
        assert len(attempted.failures) == 1


class TestClosed:
    """Whatever still runs is ended."""

    def test_leg_is_cancelled_when_the_client_leaves_during_prefill(self) -> None:
        """Envoy itself ends only the decode leg."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        assert show(attempted.watch.closed(1.0)) == [("PREFILL", CANCELLED)]
        assert attempted.blamed() == []

    def test_leg_is_cancelled_when_it_opens_after_the_client_has_left(self) -> None:
        """It is ended when it does, before it reaches its engine."""
        attempted = Attempted()
        assert attempted.watch.closed(1.0) == []
        assert attempted.watch.awaits_prefill
        assert show(attempted.watch.prefill_opened()) == [("PREFILL", CANCELLED)]

    @pytest.mark.parametrize("status", [400, 500])
    @pytest.mark.parametrize("end", [MainClosed(), FirstEventRead(EngineError(500, b""))], ids=["client", "decode"])
    def test_leg_is_cancelled_when_the_text_of_its_error_is_awaited(self, end: Event, status: int) -> None:
        """The engine may delay the text for as long as it wants, and the leg would stay with it."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.head()
        attempted.prefill(status)
        assert ("PREFILL", CANCELLED) in show(attempted.watch.tell(end, 1.0))
        assert attempted.watch.sweep(3.5) == []

    def test_leg_is_left_alone_when_prefill_is_done(self) -> None:
        """There is nothing to end."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill()
        assert attempted.watch.closed(1.0) == []


class TestTime:
    """What takes too long."""

    def test_prefill(self) -> None:
        """Those who answer others are not blamed: a decode server without room holds prefill up, too."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        for role in (Role.PREFILL, Role.DECODE):
            attempted.fleet.endpoint(role).health.succeeded()
        assert attempted.watch.sweep(99.0) == []
        assert show(attempted.watch.sweep(101.0)) == [("MAIN", "504 prefill_timeout"), ("PREFILL", CANCELLED)]
        assert attempted.blamed() == []
        assert attempted.watch.sweep(102.0) == []

    def test_first_token_times_out_after_the_end_of_prefill(self) -> None:
        """Counted from the end of prefill."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill(now=50.0)
        assert attempted.watch.sweep(59.0) == []
        assert show(attempted.watch.sweep(61.0)) == [("MAIN", "504 first_token_timeout")]

    @pytest.mark.parametrize(("status", "due"), [(500, "502 prefill_failed"), (400, "400 engine_refused")])
    def test_text_of_prefills_error_times_out(self, status: int, due: str) -> None:
        """After a while the error does without it, and the leg is ended like the other one."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill(status, now=1.0)
        assert attempted.watch.sweep(2.5) == []
        said = attempted.watch.sweep(3.5)
        assert show(said) == [("MAIN", due), ("PREFILL", CANCELLED)]
        assert b'"error"' in main_of(said).body
        assert attempted.watch.prefill_closed(8.0) == []

    @pytest.mark.parametrize("body", [CHAT, PLAIN])
    def test_text_of_decodes_error_times_out(self, body: bytes) -> None:
        """The failure becomes a retry, or an error of the service with the engine's status."""
        attempted = Attempted(body=body)
        attempted.watch.prefill_opened()
        attempted.head(503, now=1.0)
        assert attempted.watch.sweep(2.5) == []
        said = attempted.watch.sweep(3.5)
        assert show(said) == [("MAIN", "502 decode_failed"), ("PREFILL", CANCELLED)]
        assert dict(main_of(said).headers)[contract.RETRY] == "1"
        assert b"503" in main_of(said).body
        assert attempted.blamed() == [Role.DECODE]

    @pytest.mark.parametrize("has_head", [False, True])
    def test_stream_times_out_after_the_time_of_both_legs_when_the_leg_does_not_open(self, has_head: bool) -> None:
        """A stream is given up when both parts of it have taken as long as they may, head or not."""
        attempted = Attempted()
        if has_head:
            attempted.head(now=1.0)
        assert ("MAIN", Immediate) not in [(where, type(reply)) for where, reply in attempted.watch.sweep(109.0)]
        assert show(attempted.watch.sweep(111.0)) == [("MAIN", "504 first_token_timeout")]

    def test_whole_response_does_not_time_out_when_the_leg_does_not_open(self) -> None:
        """Its headers come with its end, and the state of prefill is not reported here."""
        attempted = Attempted(body=PLAIN)
        assert attempted.watch.sweep(5000.0) == []

    def test_stream_without_a_body_is_committed_after_prefill(self) -> None:
        """There is no first event to wait for."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill()
        assert show(attempted.head(has_body=False)) == LET_GO

    @pytest.mark.parametrize(
        ("alive", "blamed"),
        [
            ((), [Role.PREFILL, Role.DECODE]),
            ((Role.PREFILL,), [Role.DECODE]),
            ((Role.DECODE,), [Role.PREFILL]),
            ((Role.PREFILL, Role.DECODE), []),
        ],
    )
    def test_timeout_is_blamed_on_endpoints_that_have_served_nothing_since(
        self, alive: tuple[Role, ...], blamed: list[Role]
    ) -> None:
        """An engine that hangs answers no request, while a full one answers others."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        for role in alive:
            attempted.fleet.endpoint(role).health.succeeded()
        attempted.watch.sweep(101.0)
        assert attempted.blamed() == blamed

    def test_prefill_is_not_blamed_for_a_late_first_token(self) -> None:
        """It has done its part."""
        attempted = Attempted()
        attempted.watch.prefill_opened()
        attempted.prefill(now=1.0)
        attempted.watch.sweep(12.0)
        assert attempted.blamed() == [Role.DECODE]

    def test_whole_response_does_not_time_out(self) -> None:
        """Its head comes with its end."""
        attempted = Attempted(body=PLAIN)
        attempted.watch.prefill_opened()
        attempted.prefill(now=50.0)
        assert attempted.watch.sweep(5000.0) == []


class TestAttempts:
    """The last attempt's error is the client's."""

    def test_last_attempt_is_not_retried(self) -> None:
        """Two have failed before, and three are made."""
        attempted = Attempted(failed="a:1,b:2;c:3,d:4")
        attempted.watch.prefill_opened()
        attempted.prefill(500, has_body=False)
        assert attempted.failures == [(Role.PREFILL, Reason.PREFILL_FAILED, False)]

    def test_failure_is_not_retried_without_budget(self) -> None:
        """In a storm the client gets its error at once."""
        budget = RetrySettings(attempts=3, burst=1, budget=0)
        attempted = Attempted(retry=budget)
        attempted.watch._budget.spend(1)
        attempted.watch.prefill_opened()
        reply = main_of(attempted.prefill(500, has_body=False))
        assert contract.RETRY not in dict(reply.headers)


def _explained(attempted: Attempted, leg: Role, text: bytes) -> list[Say]:
    """Let a leg fail with a status of 500 and a text."""
    attempted.watch.prefill_opened()
    if leg is Role.PREFILL:
        attempted.prefill(500)
        return attempted.watch.prefill_explained(text, 1.0)
    attempted.head(500)
    return attempted.watch.decode_explained(text, 1.0)


def _signature_of(text: bytes) -> str:
    """Return the signature that the failure of an engine with this text has."""
    return engine_error(Role.DECODE, 500, text, "").signature
