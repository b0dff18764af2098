"""Whatever comes over the bus: the replica lives, requests are placed, and every number stays finite."""

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.engines.model import Role
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.observability.metrics import SyncMetrics, Telemetry
from dp_extproc.observability.pages import describe_loads, describe_sync
from dp_extproc.prefix_cache.blocks import Prefix
from dp_extproc.request.path import Api
from dp_extproc.scheduling.decision import Decision
from dp_extproc.sync.messages import (
    FRAME_BYTES,
    MOST_BYTES,
    Ask,
    Batch,
    Dispatched,
    Ended,
    FirstToken,
    Message,
    PrefillAnswered,
    Snapshot,
    Unreadable,
    decode,
    encode,
)
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.transport.bus import Listener
from dp_extproc.sync.transport.replica import Replica
from finite import assert_finite
from fleet_fixtures import Fleet, make_endpoint, make_facts
from fuzz.effort import examples
from sync.hostile import DEEP, HEADER, NESTED, hostile_messages

PREFILL, DECODE = make_endpoint(Role.PREFILL).url, make_endpoint(Role.DECODE).url
PROMPT = json.dumps({"text": "a prompt " * 100, "sampling_params": {"max_new_tokens": 1}}).encode()

EXTREMES: tuple[Any, ...] = (
    0, 1, -1, 0.0, -0.0, 0.5, 5e-324, 1e-200, 1e-160, 2.2e-308, 1e15, 1.7e308, -1.7e308, math.inf, -math.inf, math.nan,
    2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), None, True, "7", [], {},
)  # fmt: skip


class Target:
    """A replica over a real fleet; it says what bytes have come of its life."""

    lost = 0

    def __init__(self) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        open_peer = self.fleet.dispatcher.tracker.open_peer
        self.replica = Replica(Outbox("own"), self, open_peer, clock=self.fleet.clock, silence=3.0)
        self.telemetry = Telemetry(self.fleet.load, self.fleet.clock)
        self.telemetry.add(SyncMetrics(self.replica.status))

    def send(self, message: bytes) -> None: ...
    async def run(self, listener: Listener) -> None: ...

    def count(self, kind: str) -> int:
        return self.replica.status().anomalies[kind]

    def live(self, seconds: float) -> None:
        """Let time pass, engines be read and a request be placed; then look at both pages."""
        self.fleet.clock.now += seconds
        for role, tokens in ((Role.PREFILL, 700), (Role.DECODE, 0)):
            self.fleet.sample(make_endpoint(role), [tokens] * 4)
        self.replica._beat()
        decision = self.fleet.dispatcher.place(Api.GENERATE, PROMPT)
        assert isinstance(decision, Decision)
        assert decision.in_flight is not None
        loads = {**describe_loads(self.fleet.load, self.fleet.clock()), "sync": describe_sync(self.replica.status())}
        assert_finite(self.telemetry.page().decode(), loads)
        decision.in_flight.end(self.fleet.clock())


def dispatch(**demand: Any) -> PlacementRecord:
    """Make an attempt of 900 tokens on ranks that the fleet has."""
    told = RequestCost(900.0, prefix=Prefix((1, 2), (400, 900)), session="s")
    return PlacementRecord("*", msgspec.structs.replace(told, **demand), DECODE, 1, PREFILL, 2, 100.0)


def batch(sequence: int = 1, *, now: float = 1000.0, at: float = 1000.0) -> Batch:
    """Make a batch in which everything happens to one attempt."""
    events = (Dispatched(7, at, dispatch()), PrefillAnswered(7, at), FirstToken(7, at), Ended(7, at))
    return Batch("peer", sequence, now, events[: 1 + sequence % 4])


def replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Give a copy of nested lists and dictionaries with something else at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the place of everything that is in nested lists and dictionaries."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [above, *(place for key in keys for place in places(value[key], (*above, key)))]


def plain(message: Message) -> Any:
    """Take a message apart into lists and dictionaries."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


REAL: tuple[Message, ...] = (
    batch(1),
    batch(2),
    batch(3),
    Snapshot("peer", 9, 1000.0, 0, 1, batch(2).events),
    Ask("peer", None),
)
CHANGED = [(plain(message), place) for message in REAL for place in places(plain(message))]


@st.composite
def changed_messages(draw: st.DrawFn) -> bytes:
    """A real message in which some numbers, or whatever else stands there, are others."""
    message, place = draw(st.sampled_from(CHANGED))
    new = replaced(message, place, draw(st.sampled_from(EXTREMES) | st.floats() | st.integers(-(2**63), 2**64 - 1)))
    if draw(st.booleans()):
        new = replaced(new, draw(st.sampled_from(places(new))), draw(st.sampled_from(EXTREMES)))
    return HEADER + msgspec.msgpack.encode(new)


@st.composite
def damaged_messages(draw: st.DrawFn) -> bytes:
    """A real message in which a stretch of bytes is another."""
    data = encode(draw(st.sampled_from(REAL)))
    start = draw(st.integers(0, len(data)))
    return data[:start] + draw(st.binary(max_size=12)) + data[start + draw(st.integers(0, 12)) :]


ANYTHING = changed_messages() | damaged_messages() | st.binary(max_size=60).map(HEADER.__add__)


@given(story=st.lists(st.tuples(ANYTHING, st.sampled_from([0.0, 0.1, 1.0, 5.0])), min_size=1, max_size=6))
@example(story=[(NESTED, 0.0)])
@example(story=[(encode(Batch("p", 1, 1000.0, (Dispatched(1, 1000.0, dispatch(tokens=math.inf)),))), 1.0)])
@example(story=[(encode(Batch("p", 1, 1000.0, (Dispatched(1, 1000.0, dispatch(tokens=1e-200)),))), 1.0)] * 3)
@example(story=[(encode(Batch("p", 1, math.inf, ())), 0.0), (encode(Batch("p", 2, -1e308, batch(2).events)), 1.0)])
@example(story=[(encode(batch(1, now=2.0**52, at=0.0)), 1.0), (encode(batch(2, now=2.0**52, at=0.0)), 1.0)])
@examples(300)
def test_no_message_does_harm(story: list[tuple[bytes, float]]) -> None:
    """It is applied or left out; then the next request is placed, and both pages can be read."""
    target = Target()
    for message, passed in story:
        target.replica.receive(message)
        target.live(passed)
    target.live(10.0)

    assert target.count("unapplied") == 0
    assert not target.replica.status().peers  # all have been silent for too long, whatever they said of the time


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, -1.0, -5e-324, 2.0**53, 1e308])
@pytest.mark.parametrize(
    "place",
    [
        (2,), (3,), (4, 0, 1), (4, 0, 2), (4, 0, 3, "cached"), (4, 0, 3, "decode_rank"), (4, 0, 3, "prefill_rank"),
        (4, 0, 3, "demand", "tokens"), (4, 0, 3, "demand", "requests"), (4, 0, 3, "demand", "text_bytes"),
        (4, 0, 3, "demand", "known_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_a_number_that_cannot_be_is_garbage(place: tuple[int | str, ...], number: float) -> None:
    """Every number of a message has its bounds, whichever it is."""
    told = plain(batch(1))
    data = HEADER + msgspec.msgpack.encode(replaced(told, place, number))

    assert decode(HEADER + msgspec.msgpack.encode(told)) == batch(1)
    assert decode(data) is Unreadable.UNDECODABLE


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(NESTED, id="nested-behind"),
        pytest.param(HEADER + DEEP, id="nested"),
        pytest.param(HEADER + b"\x81\xa1a" * 20_000 + b"\x90", id="nested-maps"),
        pytest.param(HEADER + b"\xdd\xff\xff\xff\xff", id="four-billion-items"),
        pytest.param(HEADER + b"\x95\x00\xa2\xff\xff\x01\xcb" + bytes(8) + b"\x90", id="not-utf-8"),
        pytest.param(encode(Ask("a" * (MOST_BYTES + FRAME_BYTES), None)), id="too-large"),
        pytest.param(HEADER + msgspec.msgpack.encode([1, "a", 1, 1.0, 1, 1, []]), id="part-behind-the-last"),
        pytest.param(HEADER + msgspec.msgpack.encode([1, "a", 1, 1.0, 0, 0, []]), id="no-parts"),
    ],
)
def test_what_is_not_well_formed_is_garbage(data: bytes) -> None:
    """However it is built: it takes neither an error nor memory."""
    assert decode(data) is Unreadable.UNDECODABLE


def test_every_hostile_message_is_garbage() -> None:
    """So are those that other tests send over real buses."""
    assert {decode(data) for data in hostile_messages(dispatch())} == {Unreadable.UNDECODABLE}


def test_a_prompt_has_no_more_cached_than_it_has() -> None:
    """Or a rank would have been sent less than nothing, and would be preferred for ever."""
    target = Target()
    told = msgspec.structs.replace(dispatch(), cached=1e12)
    target.replica.receive(encode(Batch("peer", 1, 1000.0, (Dispatched(1, 1000.0, told),))))

    ranks = target.fleet.host(Role.PREFILL).ranks
    assert [rank.uncached_prompt_tokens for rank in ranks] == [0.0] * 4
    assert target.fleet.host(Role.PREFILL).cached_prompt_tokens == 900.0


def test_an_attempt_is_at_most_a_day_old() -> None:
    """A clock that has jumped makes no attempt so old that its growth is all there is on the books."""
    target = Target()
    events = (Dispatched(1, 0.0, dispatch()), PrefillAnswered(1, 0.0), FirstToken(1, 0.0))
    target.replica.receive(encode(Batch("peer", 1, 2.0**52, events)))

    (open_one,) = target.fleet.host(Role.DECODE).ranks[1].open
    assert open_one.since == target.fleet.clock() - 86_400


def test_faults_of_ours_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever else a message may do: requests are served, each is counted, and no log is filled."""
    target = Target()

    def fail(_dispatch: PlacementRecord, _at: float) -> Any:
        raise ZeroDivisionError("float division by zero")

    target.replica._peers._open_foreign = fail
    for _ in range(50):
        target.replica.receive(encode(batch(1)))

    assert target.count("unapplied") == 50
    assert len([record for record in caplog.records if record.exc_info]) == 1
    target.live(1.0)
