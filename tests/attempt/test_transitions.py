"""The tables of the state machines, walked exhaustively: no dead state, and no outcome that nothing produces."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest

from attempt.attempts import BODY_PAUSE, make_environment
from dp_extproc.attempt.attempt import Attempt, ProtocolViolationError
from dp_extproc.attempt.events import (
    AbortWanted,
    BodyMode,
    CommentRead,
    Event,
    FirstEventRead,
    InternalError,
    LegBody,
    LegClosed,
    LegHeaders,
    LegOpened,
    LegUnseen,
    MainClosed,
    QueueExpired,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    RoomFreed,
)
from dp_extproc.attempt.first_event_watch import FirstEventWatch
from dp_extproc.attempt.gateways import BundledEnvoy, EndpointPicker
from dp_extproc.attempt.held_response import KEPT_BYTES
from dp_extproc.attempt.main_stream import MainStream
from dp_extproc.attempt.prefill_leg import PrefillLeg
from dp_extproc.attempt.transitions import FIRST_EVENT, LEG, MAIN, FirstState, LegState, MainState, Outcome
from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.request.body import read_body
from dp_extproc.request.path import Passed
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api
from dp_extproc.response.first_event import EngineError
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Answer, Decision, Queued, RequestContext, SchedulingResult
from dp_extproc.scheduling.encoder import LegSettings
from fleet_fixtures import Fleet, make_facts

TABLES: Final[Mapping[str, Mapping[Any, Mapping[Outcome, Any]]]] = {
    "main": MAIN,
    "leg": LEG,
    "first event": FIRST_EVENT,
}
STATES: Final[Mapping[str, Sequence[Any]]] = {
    "main": list(MainState),
    "leg": list(LegState),
    "first event": list(FirstState),
}
POST: Final = {":method": "POST", ":path": "/generate"}
PLAIN: Final = b'{"text":"hello"}'
STREAM: Final = b'{"text":"hello","stream":true}'
LOGPROBS: Final = b'{"text":"hello","return_logprob":true}'
REFUSED: Final = Rejection(503, Reason.NO_ENDPOINTS, "as asked")
EVENT: Final = b'data: {"text":"a"}\n\n'
ERROR: Final = b'data: {"error":{"code":500}}\n\n'
HOLD: Final = 2.0
"""Seconds for which a gateway lets response headers be held."""
SECONDS: Final = {"prefill_timeout": "20s", "first_token_timeout": "20s"}


class Scripted:
    """A decider that refuses and queues on demand, and else schedules."""

    def __init__(self, *, sends_legs: bool) -> None:
        fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        self._scheduler = fleet.make_scheduler(legs=LegSettings(sends_prefill=sends_legs))

    def place(self, api: Api, body: bytes, context: RequestContext) -> SchedulingResult:
        if body == b"refuse":
            return REFUSED
        if body == b"queue":
            request = read_body(api, PLAIN)
            assert not isinstance(request, Rejection)
            return Queued("*", 0, request, None, REFUSED)
        return self._scheduler.place(api, body, context)

    def place_unread(self, api: Api, length: int | None, context: RequestContext) -> SchedulingResult:
        return self.place(api, {1: b"refuse", 2: b"queue"}.get(length or 0, PLAIN), context)

    def place_queued(self, queued: Queued, context: RequestContext) -> SchedulingResult:
        assert context.ticket is not None
        if context.ticket.pool == "again":
            return queued
        if context.ticket.pool == "gone":
            return REFUSED
        return self.place(Api.GENERATE, PLAIN, RequestContext())

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        return self._scheduler.look_up(subset)

    def pass_on(self, passed: Passed, body: bytes | None, context: RequestContext) -> Decision | Rejection | None:
        return None if body is None and passed.route.by_model else self._scheduler.look_up()

    def models(self, path: str) -> Answer | Rejection:
        return Answer(b"{}")

    def lost(self, address: str) -> None:
        """No endpoint is at stake."""

    def suspect(self, url: str) -> None:
        pass

    def contradicted(self, url: str, why: str) -> None:
        pass

    def engine_lost(self, fingerprint: str, address: str) -> None:
        """No endpoint is at stake."""


@dataclass(frozen=True)
class Story:
    """A way into a state."""

    events: tuple[Event | float, ...] = ()
    mode: BodyMode = BodyMode.LOCKSTEP
    response_mode: BodyMode = BodyMode.LOCKSTEP
    supervise: Supervise = Supervise.FIRST_EVENT
    picks: bool = False
    """Whether the gateway is another one, so that the service sends the prefill leg."""

    def then(self, *more: Event | float) -> "Story":
        return replace(self, events=(*self.events, *more))


def room(pool: str) -> RoomFreed:
    return RoomFreed(Ticket(pool, 0, 0, lambda: None))


HEADERS: Final = RequestHeaders(POST, False)
START: Final = Story()
BODY: Final = Story((HEADERS,))
CHUNKS: Final = replace(BODY, mode=BodyMode.DUPLEX)
ENDING: Final = CHUNKS.then(RequestBody(PLAIN, False))
ENDING_QUEUED: Final = CHUNKS.then(RequestBody(b"queue", False))
TOKENIZING: Final = Story((RequestHeaders({":method": "POST", ":path": "/tokenize"}, False),))
TOKENIZING_CHUNKS: Final = replace(TOKENIZING, mode=BodyMode.DUPLEX).then(RequestBody(PLAIN, False))
UNREAD: Final = replace(START, mode=BodyMode.NONE)
QUEUED: Final = BODY.then(RequestBody(b"queue", True))
PASSING: Final = Story((RequestHeaders({":method": "GET", ":path": "/health"}, False),))
ROUTED: Final = BODY.then(RequestBody(PLAIN, True))
STREAMING: Final = BODY.then(RequestBody(STREAM, True))
UNSUPERVISED: Final = replace(ROUTED, supervise=Supervise.OFF)
HELD: Final = ROUTED.then(ResponseHeaders(200))
FAILING: Final = ROUTED.then(ResponseHeaders(500))
FAILING_IN_CHUNKS: Final = replace(FAILING, response_mode=BodyMode.DUPLEX)
RESPONDING: Final = ROUTED.then(ResponseHeaders(404, is_encoded=True))
MERGING: Final = BODY.then(
    RequestBody(LOGPROBS, True), LegOpened(), LegHeaders(200), ResponseHeaders(200), ResponseBody(b"{", False)
)
ANSWERED: Final = Story((RequestHeaders({**POST, ":path": "/no"}, False),))
OPEN: Final = ROUTED.then(LegOpened())
CHECKING: Final = OPEN.then(LegHeaders(200, is_events=True))
LEG_FAILING: Final = OPEN.then(LegHeaders(500))
MISSING: Final = STREAMING.then(ResponseHeaders(200), 3.0)
CANCELLED: Final = ROUTED.then(MainClosed())
DIRECT: Final = replace(STREAMING, picks=True)
COMMENTED: Final = STREAMING.then(CommentRead())
DIRECT_HELD: Final = DIRECT.then(ResponseHeaders(200))
STORIES: Final = (
    *(START, BODY, CHUNKS, ENDING, ENDING_QUEUED, UNREAD, QUEUED, PASSING, ROUTED, STREAMING, UNSUPERVISED, HELD),
    *(FAILING, FAILING_IN_CHUNKS, RESPONDING, MERGING, ANSWERED, OPEN, CHECKING, LEG_FAILING, MISSING, CANCELLED),
    *(DIRECT, DIRECT_HELD, TOKENIZING, TOKENIZING_CHUNKS, COMMENTED),
)
EVENTS: Final[tuple[Event | float, ...]] = (
    *(
        HEADERS,
        RequestHeaders({**POST, ":path": "/no"}, False),
        RequestHeaders({":method": "GET", ":path": "/health"}, True),
    ),
    *(RequestHeaders({**POST, "content-length": length}, False) for length in "12"),
    *(RequestBody(data, True) for data in (PLAIN, STREAM, b"refuse", b"queue")),
    *(RequestBody(data, False) for data in (PLAIN, b"")),
    RequestTrailers(),
    *(ResponseHeaders(status) for status in (200, 400, 404, 500)),
    ResponseHeaders(200, end_of_stream=True),
    ResponseHeaders(200, is_events=True, is_encoded=True),
    ResponseBody(b"{}", True),
    *(ResponseBody(data, False) for data in (b"{", bytes(KEPT_BYTES + 1))),
    ResponseTrailers(),
    *(room("again"), room("gone"), room("free"), QueueExpired(), AbortWanted((0,)), AbortWanted(())),
    *(
        LegOpened(),
        LegHeaders(200),
        LegHeaders(200, is_events=True),
        LegHeaders(500),
        LegHeaders(500, end_of_stream=True),
    ),
    *(LegBody(data, False) for data in (b"", EVENT, ERROR)),
    LegClosed(),
    LegUnseen(),
    CommentRead(),
    *(FirstEventRead(error) for error in (None, EngineError(500, b"{}"))),
    InternalError("broken"),
    *(3.0, 30.0, BODY_PAUSE + 1.0),
    MainClosed(),
)


class Recorder:
    """Puts itself in place of the tables, and keeps which outcome was looked up in which row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: set[tuple[str, Any, Outcome]] = set()
        for machine, table in ((MainStream, "main"), (PrefillLeg, "leg"), (FirstEventWatch, "first event")):
            steps = {key: (_Row(row, table, key, self.found), action) for key, (row, action) in machine._STEPS.items()}
            monkeypatch.setattr(machine, "_STEPS", steps)


class _Row(dict[Outcome, Any]):
    def __init__(self, row: Mapping[Outcome, Any], table: str, key: Any, found: set[tuple[str, Any, Outcome]]) -> None:
        super().__init__(row)
        self._table, self._key, self._found = table, key, found

    def __getitem__(self, outcome: Outcome) -> Any:
        self._found.add((self._table, self._key, outcome))
        return super().__getitem__(outcome)


def play(story: Story) -> Attempt:
    supervision = SupervisionSettings.model_validate({"mode": story.supervise.value, **SECONDS})
    gateway = EndpointPicker(hold=HOLD) if story.picks else BundledEnvoy()
    decider = Scripted(sends_legs=story.picks)
    attempt = Attempt(
        make_environment(decider, gateway=gateway, supervision=supervision), story.mode, story.response_mode
    )
    for step in story.events:
        if isinstance(step, float):
            attempt.advance(step)
        else:
            attempt.receive(step, 0.0)
    return attempt


def all_outcomes() -> Iterator[tuple[str, Any, Outcome]]:
    for table, rows in TABLES.items():
        for key, row in rows.items():
            for outcome in row:
                yield table, key, outcome


def test_every_outcome_of_every_table_is_produced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that nothing uses would only pretend to be a rule."""
    recorder = Recorder(monkeypatch)
    for story, step in product(STORIES, EVENTS):
        try:
            play(story.then(step))
        except ProtocolViolationError:
            assert not isinstance(step, float)

    assert set(all_outcomes()) - recorder.found == set()


@pytest.mark.parametrize("table", TABLES)
def test_every_state_is_reached_from_the_first(table: str) -> None:
    """A state that no transition leads to would be dead."""
    states = STATES[table]
    reached = {states[0]}
    for _ in states:
        reached |= {after for (state, _), row in TABLES[table].items() if state in reached for after in row.values()}

    assert reached == set(states)


def test_every_state_of_the_main_stream_has_a_way_to_its_end() -> None:
    """Otherwise reservations could stay for ever."""
    assert {state for (state, cause) in MAIN if cause is MainClosed} == set(MainState) - {MainState.CLOSED}
    assert all(MAIN[state, MainClosed] == {Outcome.CLOSED: MainState.CLOSED} for state in list(MainState)[:-1])


def test_diagram_of_the_documentation_is_the_table_of_the_main_stream() -> None:
    """A reader of the diagram sees each transition, but for the two that the page leaves out."""
    page = Path(__file__).parents[2] / "docs" / "development.md"
    drawn = re.findall(r"^    ([A-Z_]+) --> ([A-Z_]+):", page.read_text(encoding="utf-8"), re.MULTILINE)
    table = {
        (state.name, after.name)
        for (state, cause), row in MAIN.items()
        for after in row.values()
        if cause not in {MainClosed, InternalError} and after is not state
    }
    assert sorted(drawn) == sorted(table | {("RESPONDING", "CLOSED"), ("ANSWERED", "CLOSED")})


@pytest.mark.parametrize("story", STORIES)
def test_nothing_is_due_when_an_attempt_has_ended(story: Story) -> None:
    """However far it was: all reservations are gone, and no deadline is left."""
    attempt = play(story if CANCELLED.events == story.events else story.then(MainClosed()))

    assert attempt.is_over(10_000.0)
    assert attempt.deadline == float("inf")
    assert attempt.advance(10_000.0) == []
