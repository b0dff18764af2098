"""Replicas stay up, requests are scheduled and every number stays finite, whatever comes over the bus."""

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.engines.model import Role
from dp_extproc.load.autoscaling import Autoscaling
from dp_extproc.load.records import NO_WORK, PlacementRecord, RequestCost
from dp_extproc.observability.loads_page import describe_loads, describe_sync
from dp_extproc.observability.metrics import AutoscalingMetrics, SyncMetrics, Telemetry
from dp_extproc.prefix_cache.blocks import Prefix
from dp_extproc.request.path import Api
from dp_extproc.scheduling.decision import Decision
from dp_extproc.sync.messages import (
    MAX_EVENT_BYTES,
    MAX_FRAME_BYTES,
    AnyNotice,
    Batch,
    Ended,
    FirstToken,
    Message,
    Placed,
    PrefillAnswered,
    Snapshot,
    SnapshotRequest,
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


class Receiver:
    """A replica over a real fleet, and its bus."""

    lost = 0
    problem = None

    def __init__(self) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        open_peer = self.fleet.scheduler.tracker.open_peer
        self.heeded: list[AnyNotice] = []
        self.replica = Replica(
            Outbox("own"),
            self,
            open_peer,
            heed=lambda notice, _at: self.heeded.append(notice),
            clock=self.fleet.clock,
            peer_timeout=3.0,
        )
        self.telemetry = Telemetry(self.fleet.load, self.fleet.clock)
        self.telemetry.add(SyncMetrics(self.replica.status))
        autoscaling = Autoscaling(self.fleet.load, AutoscalingSettings(), lambda _pool: NO_WORK)
        self.telemetry.add(AutoscalingMetrics(autoscaling, self.fleet.clock))

    def send(self, message: bytes) -> None: ...
    async def run(self, listener: Listener) -> None: ...

    def count(self, kind: str) -> int:
        return self.replica.status().anomalies[kind]

    def live(self, seconds: float) -> None:
        """Advance the time, sample the engines and schedule a request; then read both pages."""
        self.fleet.clock.now += seconds
        for role, tokens in ((Role.PREFILL, 700), (Role.DECODE, 0)):
            self.fleet.sample(make_endpoint(role), [tokens] * 4)
        self.replica._beat()
        decision = self.fleet.scheduler.place(Api.GENERATE, PROMPT)
        assert isinstance(decision, Decision)
        assert decision.in_flight is not None
        loads = {**describe_loads(self.fleet.load, self.fleet.clock()), "sync": describe_sync(self.replica.status())}
        assert_finite(self.telemetry.page().decode(), loads)
        decision.in_flight.end(self.fleet.clock())


def record(**cost: Any) -> PlacementRecord:
    """Make the record of an attempt of 900 tokens on ranks that the fleet has."""
    default = RequestCost(900.0, prefix=Prefix((1, 2), (400, 900)), session="s")
    return PlacementRecord("*", msgspec.structs.replace(default, **cost), DECODE, 1, PREFILL, 2, 100.0)


def batch(sequence: int = 1, *, now: float = 1000.0, at: float = 1000.0) -> Batch:
    """Make a batch with all events of one attempt."""
    events = (Placed(7, at, record()), PrefillAnswered(7, at), FirstToken(7, at), Ended(7, at))
    return Batch("peer", sequence, now, events[: 1 + sequence % 4])


def replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Return a copy of nested lists and dictionaries with another value at one path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values in nested lists and dictionaries."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [above, *(path for key in keys for path in paths(value[key], (*above, key)))]


def plain(message: Message) -> Any:
    """Convert a message to lists and dictionaries."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


REAL: tuple[Message, ...] = (
    batch(1),
    batch(2),
    batch(3),
    Snapshot("peer", 9, 1000.0, 0, 1, batch(2).events),
    SnapshotRequest("peer", None),
)
CHANGED = [(plain(message), path) for message in REAL for path in paths(plain(message))]


@st.composite
def changed_messages(draw: st.DrawFn) -> bytes:
    """Draw a real message with other values at one or two paths."""
    message, path = draw(st.sampled_from(CHANGED))
    new = replaced(message, path, draw(st.sampled_from(EXTREMES) | st.floats() | st.integers(-(2**63), 2**64 - 1)))
    if draw(st.booleans()):
        new = replaced(new, draw(st.sampled_from(paths(new))), draw(st.sampled_from(EXTREMES)))
    return HEADER + msgspec.msgpack.encode(new)


@st.composite
def damaged_messages(draw: st.DrawFn) -> bytes:
    """Draw a real message with a few other bytes."""
    data = encode(draw(st.sampled_from(REAL)))
    start = draw(st.integers(0, len(data)))
    return data[:start] + draw(st.binary(max_size=12)) + data[start + draw(st.integers(0, 12)) :]


ANYTHING = changed_messages() | damaged_messages() | st.binary(max_size=60).map(HEADER.__add__)


@given(story=st.lists(st.tuples(ANYTHING, st.sampled_from([0.0, 0.1, 1.0, 5.0])), min_size=1, max_size=6))
@example(story=[(NESTED, 0.0)])
@example(story=[(encode(Batch("p", 1, 1000.0, (Placed(1, 1000.0, record(tokens=math.inf)),))), 1.0)])
@example(story=[(encode(Batch("p", 1, 1000.0, (Placed(1, 1000.0, record(tokens=1e-200)),))), 1.0)] * 3)
@example(story=[(encode(Batch("p", 1, math.inf, ())), 0.0), (encode(Batch("p", 2, -1e308, batch(2).events)), 1.0)])
@example(story=[(encode(batch(1, now=2.0**52, at=0.0)), 1.0), (encode(batch(2, now=2.0**52, at=0.0)), 1.0)])
@examples(300)
def test_replica_works_on_after_any_message(story: list[tuple[bytes, float]]) -> None:
    """A message is applied or refused; then the next request is scheduled, and both pages can be read."""
    receiver = Receiver()
    for message, passed in story:
        receiver.replica.receive(message)
        receiver.live(passed)
    receiver.live(10.0)

    assert receiver.count("unapplied") == 0
    assert not receiver.replica.status().peers  # all are past the timeout, whatever times they sent


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, -1.0, -5e-324, 2.0**53, 1e308])
@pytest.mark.parametrize(
    "path",
    [
        (2,), (3,), (4, 0, 1), (4, 0, 2), (4, 0, 3, "cached"), (4, 0, 3, "decode_rank"), (4, 0, 3, "prefill_rank"),
        (4, 0, 3, "demand", "tokens"), (4, 0, 3, "demand", "requests"), (4, 0, 3, "demand", "text_bytes"),
        (4, 0, 3, "demand", "known_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_message_is_garbage_with_a_number_out_of_bounds(path: tuple[int | str, ...], number: float) -> None:
    """Every number of a message has its bounds."""
    sound = plain(batch(1))
    data = HEADER + msgspec.msgpack.encode(replaced(sound, path, number))

    assert decode(HEADER + msgspec.msgpack.encode(sound)) == batch(1)
    assert decode(data) is Unreadable.UNDECODABLE


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(NESTED, id="nested-behind"),
        pytest.param(HEADER + DEEP, id="nested"),
        pytest.param(HEADER + b"\x81\xa1a" * 20_000 + b"\x90", id="nested-maps"),
        pytest.param(HEADER + b"\xdd\xff\xff\xff\xff", id="four-billion-items"),
        pytest.param(HEADER + b"\x95\x00\xa2\xff\xff\x01\xcb" + bytes(8) + b"\x90", id="not-utf-8"),
        pytest.param(encode(SnapshotRequest("a" * (MAX_EVENT_BYTES + MAX_FRAME_BYTES), None)), id="too-large"),
        pytest.param(HEADER + msgspec.msgpack.encode([1, "a", 1, 1.0, 1, 1, []]), id="part-behind-the-last"),
        pytest.param(HEADER + msgspec.msgpack.encode([1, "a", 1, 1.0, 0, 0, []]), id="no-parts"),
    ],
)
def test_message_is_garbage_if_not_well_formed(data: bytes) -> None:
    """Malformed data raises no other error, and allocates no memory."""
    assert decode(data) is Unreadable.UNDECODABLE


def test_hostile_messages_are_garbage() -> None:
    """Tests with real buses send these messages, too."""
    assert {decode(data) for data in hostile_messages(record())} == {Unreadable.UNDECODABLE}


def test_cached_tokens_do_not_exceed_the_prompt() -> None:
    """More would give a rank a negative load, and it would be preferred for ever."""
    receiver = Receiver()
    huge = msgspec.structs.replace(record(), cached=1e12)
    receiver.replica.receive(encode(Batch("peer", 1, 1000.0, (Placed(1, 1000.0, huge),))))

    ranks = receiver.fleet.endpoint(Role.PREFILL).ranks
    assert [rank.uncached_prompt_tokens for rank in ranks] == [0.0] * 4
    assert receiver.fleet.endpoint(Role.PREFILL).cached_prompt_tokens == 900.0


def test_peer_attempt_is_at_most_a_day_old() -> None:
    """An attempt that a clock jump made older would outgrow all other load."""
    receiver = Receiver()
    events = (Placed(1, 0.0, record()), PrefillAnswered(1, 0.0), FirstToken(1, 0.0))
    receiver.replica.receive(encode(Batch("peer", 1, 2.0**52, events)))

    (open_one,) = receiver.fleet.endpoint(Role.DECODE).ranks[1].open
    assert open_one.since == receiver.fleet.clock() - 86_400


def test_errors_in_applying_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Requests are served, each error is counted, and no log is filled."""
    receiver = Receiver()

    def fail(_record: PlacementRecord, _at: float) -> Any:
        raise ZeroDivisionError("float division by zero")

    receiver.replica._peers._open_peer = fail
    for _ in range(50):
        receiver.replica.receive(encode(batch(1)))

    assert receiver.count("unapplied") == 50
    assert len([record for record in caplog.records if record.exc_info]) == 1
    receiver.live(1.0)
