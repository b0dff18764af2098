"""A request is placed while a rank has room, and waits or is refused otherwise."""

import json
from typing import Any

import pytest

from attempt.attempts import Exchange
from dp_extproc.attempt.events import BodyMode, Mutate, RequestBody, RequestHeaders
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.reliability import AdmissionSettings, QueueSettings
from dp_extproc.engines.model import LoadPage, RankSample, Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.admission import AdmissionQueue
from dp_extproc.scheduling.decision import Decision, Queued, RequestContext, SchedulingResult
from fleet_fixtures import Fleet, make_endpoint, make_facts

CAPACITY, RUNNING = 1000, 2


def ids(tokens: int) -> bytes:
    return json.dumps({"input_ids": list(range(tokens))}).encode()


class Small:
    """One prefill and one decode endpoint of two ranks, each of which holds 1000 tokens and runs two requests."""

    def __init__(self, queue: AdmissionQueue | None = None, **limits: Any) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL, ranks=2)], decodes=[make_facts(Role.DECODE, ranks=2)])
        ranks = tuple(
            RankSample(rank, used_tokens=0, capacity_tokens=CAPACITY, max_running_requests=RUNNING, age=0.0)
            for rank in range(2)
        )
        for role in (Role.PREFILL, Role.DECODE):
            self.fleet.load.sampled(make_endpoint(role), LoadPage(ranks), self.fleet.clock(), self.fleet.clock())
        settings = AdmissionSettings.model_validate({"max_token_ratio": None, "max_request_ratio": None, **limits})
        self.scheduler = self.fleet.make_scheduler(admission=settings, queue=queue)

    def place(self, tokens: int) -> SchedulingResult:
        return self.scheduler.place(Api.GENERATE, ids(tokens))

    def place_until_refused(self, tokens: int, most: int = 50) -> tuple[list[Decision], Rejection]:
        placed: list[Decision] = []
        for _ in range(most):
            found = self.place(tokens)
            if not isinstance(found, Decision):
                return placed, found.rejection if isinstance(found, Queued) else found
            placed.append(found)
        raise AssertionError(f"{most} requests were placed")


@pytest.mark.parametrize(
    ("limits", "tokens", "expected"),
    [
        pytest.param({"max_requests": 3}, 10, 6, id="requests"),
        pytest.param({"max_request_ratio": 2.0}, 10, 8, id="requests-by-what-runs"),
    ],
)
def test_request_is_refused_with_429_if_all_ranks_are_full(limits: dict[str, Any], tokens: int, expected: int) -> None:
    """Two ranks take twice the limit of one; the refusal has a time to try again."""
    placed, refusal = Small(**limits).place_until_refused(tokens)
    assert len(placed) == expected
    assert (refusal.status, refusal.reason) == (429, Reason.OVER_CAPACITY)
    assert dict(refusal.headers)["retry-after"]
    assert json.loads(refusal.body())["error"]["type"] == "rate_limit_error"


def test_tokens_are_limited_by_the_capacity_of_a_rank() -> None:
    """Decode counts a thousand tokens for each request besides its prompt, so two fit into 4 x 1000 on each rank."""
    placed, refusal = Small(max_token_ratio=4.0).place_until_refused(900)
    assert len(placed) == 4
    assert "decode" in refusal.message


def test_idle_rank_takes_a_request_above_its_limits() -> None:
    """A limit below the size of one request would refuse it for ever."""
    small = Small(max_tokens=10)
    assert isinstance(small.place(900), Decision)
    assert isinstance(small.place(900), Decision)
    assert isinstance(small.place(900), Rejection)


class Single:
    """One aggregated endpoint of two ranks."""

    def __init__(self, *, max_requests: int, **policy: Any) -> None:
        self.fleet = Fleet(workers=[make_facts(Role.WORKER, ranks=2)], policy=policy)
        self.scheduler = self.fleet.scheduler
        settings = AdmissionSettings(max_token_ratio=None, max_request_ratio=None, max_requests=max_requests)
        self.scheduler.configure([self.fleet.pool], LoadSignal.ESTIMATE, settings)

    def place(self, body: dict[str, Any]) -> Decision:
        found = self.scheduler.place(Api.GENERATE, json.dumps(body).encode())
        assert isinstance(found, Decision), found
        return found

    def open(self) -> list[float]:
        return [rank.reserved_requests for rank in self.fleet.endpoint(Role.WORKER).ranks]


def test_batch_counts_as_one_request_per_prompt() -> None:
    """The prompts run side by side, however few messages they came in."""
    single = Single(max_requests=3)
    for _ in range(2):
        single.place({"input_ids": [[1], [2], [3]]})

    assert single.open() == [3, 3]
    assert isinstance(single.scheduler.place(Api.GENERATE, ids(1)), Rejection)


def test_request_without_a_rank_counts_in_shares() -> None:
    """Three requests that the engine spreads over two ranks are one and a half on each."""
    single = Single(max_requests=2, dp_rank="none")
    for _ in range(3):
        single.place({"input_ids": [1]})

    assert single.open() == [1.5, 1.5]
    assert isinstance(single.scheduler.place(Api.GENERATE, ids(1)), Rejection)


def test_token_round_robin_skips_a_full_rank() -> None:
    """By the tokens of all requests so far the rank of the short request is next, but only the other one has room."""
    single = Single(max_requests=1, dp_rank="token_round_robin")
    long = single.place({"input_ids": list(range(900))})
    single.place({"input_ids": [1]})
    assert long.in_flight is not None
    long.in_flight.end(single.fleet.clock())
    single.place({"input_ids": [2]})

    assert single.open() == [1, 1]


def test_rank_that_a_client_asks_for_is_ignored_if_full() -> None:
    """A pin counts as far as there is room."""
    single = Single(max_requests=1, client_dp_rank="honour")
    for _ in range(2):
        single.place({"input_ids": [1], "routed_dp_rank": 1})

    assert single.open() == [1, 1]


def test_request_is_refused_if_no_bootstrap_room_leads_to_the_free_decode_rank() -> None:
    """Where the bootstrap room decides on both legs, rank 0 of prefill goes with rank 0 of decode."""
    facts = [make_facts(role, (0, 5, 7), ranks=2) for role in (Role.PREFILL, Role.DECODE)]
    fleet = Fleet(prefills=facts[:1], decodes=facts[1:])
    settings = AdmissionSettings(max_token_ratio=None, max_request_ratio=None, max_requests=1)
    fleet.scheduler.configure([fleet.pool], LoadSignal.ESTIMATE, settings)
    free, taken = fleet.endpoint(Role.PREFILL).ranks, fleet.endpoint(Role.DECODE).ranks
    free[1].reserve(1, fleet.clock())
    taken[0].reserve(1, fleet.clock())
    refusal = fleet.scheduler.place(Api.GENERATE, ids(1))

    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.OVER_CAPACITY
    assert "decode" in refusal.message


def test_request_is_placed_after_another_one_has_ended() -> None:
    """The reservations of a request that has ended leave room."""
    small = Small(max_requests=1)
    placed, _ = small.place_until_refused(10)
    assert placed[0].in_flight is not None
    placed[0].in_flight.end(small.fleet.clock())
    assert isinstance(small.place(10), Decision)


def test_prompt_of_ids_longer_than_any_rank_is_refused_with_400() -> None:
    """Counted tokens are certain. The prompt is refused at once, as the other leg would wait for minutes."""
    small = Small()
    refusal = small.place(CAPACITY + 1)
    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (400, Reason.PROMPT_TOO_LONG)
    assert isinstance(small.place(CAPACITY), Decision)


@pytest.mark.parametrize(("text_bytes", "fits"), [(4 * CAPACITY * 3, True), (4 * CAPACITY * 5, False)])
def test_long_text_is_refused_only_if_certainly_too_long(text_bytes: int, fits: bool) -> None:
    """An estimate may be wrong by a factor; a text is refused only if no such error explains its length."""
    found = Small().scheduler.place(Api.GENERATE, json.dumps({"text": "x" * text_bytes}).encode())
    assert isinstance(found, Decision) is fits


def test_batch_is_not_refused_as_too_long() -> None:
    """The prompts of a batch can run one after the other."""
    found = Small().scheduler.place(Api.GENERATE, json.dumps({"input_ids": [[1] * 700, [1] * 700]}).encode())
    assert isinstance(found, Decision)


def test_new_request_is_queued_behind_waiting_requests() -> None:
    """There is room, but another request was there before."""
    queue = AdmissionQueue(QueueSettings())
    small = Small(queue)
    ticket = queue.enqueue("*", 0, lambda: None)
    assert ticket is not None
    found = small.place(10)
    assert isinstance(found, Queued)
    assert (found.pool, found.priority) == ("*", 0)
    assert isinstance(small.scheduler.place(Api.GENERATE, ids(10), RequestContext(ticket=ticket)), Decision)


def test_request_of_greater_priority_is_placed_before_waiting_requests() -> None:
    """``priority`` is a field of SGLang; requests of a greater one need not wait for others."""
    queue = AdmissionQueue(QueueSettings())
    small = Small(queue)
    queue.enqueue("*", 0, lambda: None)
    body = json.dumps({"input_ids": [1], "priority": 1}).encode()
    assert isinstance(small.scheduler.place(Api.GENERATE, body), Decision)


class TestNotification:
    """The admission queue is notified of every event that may have made room."""

    def setup_method(self) -> None:
        self.queue = AdmissionQueue(QueueSettings())
        self.notified = 0
        self.small = Small(self.queue)

    def wait(self) -> None:
        assert self.queue.enqueue("*", 0, self.notify) is not None
        assert self.notified == 0

    def notify(self) -> None:
        self.notified += 1

    def test_queue_is_notified_when_prefill_is_done(self) -> None:
        """The prefill reservation ends long before the response does."""
        placed = self.small.place(10)
        assert isinstance(placed, Decision)
        assert placed.in_flight is not None
        self.wait()
        placed.in_flight.prefill_answered(200, self.small.fleet.clock())
        assert self.notified == 1
        placed.in_flight.end(self.small.fleet.clock())
        assert self.notified == 2
        placed.in_flight.end(self.small.fleet.clock())
        assert self.notified == 2

    def test_queue_is_notified_when_a_request_of_a_peer_ends(self) -> None:
        """Requests of peers hold reservations like our own."""
        url = make_endpoint(Role.DECODE).url
        peer = self.small.scheduler.tracker.open_peer(PlacementRecord("*", RequestCost(10.0), url, 0), 1000.0)
        self.wait()
        peer.end(1001.0)
        assert self.notified == 1

    def test_queue_is_notified_when_an_engine_is_discovered_or_sampled(self) -> None:
        """A new engine, or a lower load, may have room."""
        endpoint = make_endpoint(Role.DECODE)
        load = LoadCache([endpoint], 5.0, made_room=self.queue.notify)
        self.wait()
        load.discovered(endpoint, "10.0.0.1:1", make_facts(Role.DECODE), 1000.0)
        assert self.notified == 1
        load.sampled(endpoint, LoadPage(()), 1000.0, 1000.0)
        assert self.notified == 2


def test_queued_request_is_parsed_once() -> None:
    """Its body may be megabytes, and it may be scheduled many times before it finds room."""
    queue = AdmissionQueue(QueueSettings())
    small = Small(queue, max_requests=1)
    placed, _ = small.place_until_refused(10)
    exchange = Exchange(small.scheduler, BodyMode.LOCKSTEP, 1 << 20)
    exchange.receive(RequestHeaders({":method": "POST", ":path": "/generate"}, False))
    exchange.receive(RequestBody(ids(20), True))
    assert exchange.is_waiting
    exchange._body = [b"not to be read again"]
    ticket = queue.enqueue("*", 0, lambda: None)
    assert ticket is not None
    assert exchange.decide_again(ticket) == ()
    for each in placed:
        assert each.in_flight is not None
        each.in_flight.end(small.fleet.clock())
    (reply,) = exchange.decide_again(ticket)

    assert isinstance(reply, Mutate)
    assert json.loads(reply.body or b"")["input_ids"] == list(range(20))
