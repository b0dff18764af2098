"""Two schedulers over the same engines balance as one, once their replicas exchange messages."""

import json
from itertools import count
from random import Random

import pytest

from dp_extproc import contract
from dp_extproc.engines.model import LoadPage, RankSample, Role
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.path import Api
from dp_extproc.scheduling.decision import Decision
from dp_extproc.sync.messages import Batch, decode
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.peers import Peers
from fleet_fixtures import Fleet, make_facts

RANKS = 4


def chat(beginning: object) -> bytes:
    """Make a request of 2000 tokens whose prompt begins with the given text."""
    return json.dumps({"model": "any", "messages": [{"role": "user", "content": f"{beginning}{'x' * 8000}"}]}).encode()


class Service:
    """Connect a scheduler to an outbox and to peers."""

    def __init__(self, name: str, *, prefill_ranks: int = RANKS) -> None:
        facts = [make_facts(Role.PREFILL, ranks=prefill_ranks)]
        self.fleet = Fleet(prefills=facts, decodes=[make_facts(Role.DECODE, ranks=RANKS)])
        self.outbox = Outbox(name)
        # Random numbers are the same for all: only the shared load keeps the picks of replicas apart.
        self.scheduler = self.fleet.make_scheduler(rng=Random(1), listener=self.outbox)
        self.peers = Peers(self.scheduler.tracker.open_peer, 3.0)
        self._prompts = count()

    def place(self, body: bytes | None = None) -> tuple[InFlight, int, int]:
        """Schedule a request, by default with a new prompt; return its in-flight request and its two ranks."""
        decision = self.scheduler.place(Api.CHAT, body or chat((self.outbox.replica, next(self._prompts))))
        assert isinstance(decision, Decision)
        assert decision.in_flight is not None
        prefill, decode_rank = (
            decision.metadata[key] for key in (contract.META_PREFILL_RANK, contract.META_DECODE_RANK)
        )
        assert isinstance(prefill, int)
        assert isinstance(decode_rank, int)
        return decision.in_flight, prefill, decode_rank

    def send_to(self, *others: "Service") -> None:
        """Send all new messages to others."""
        for data in self.outbox.collect(self.fleet.clock()):
            batch = decode(data)
            assert isinstance(batch, Batch)
            for other in others:
                other.peers.batch(batch, other.fleet.clock())

    def loads(self) -> list[list[float]]:
        """Return the load of every rank, of prefill and of decode."""
        return [[rank.tokens for rank in self.fleet.endpoint(role).ranks] for role in (Role.PREFILL, Role.DECODE)]

    def requests(self) -> list[float]:
        """Return the requests in flight of each role."""
        return [self.fleet.endpoint(role).requests for role in (Role.PREFILL, Role.DECODE)]


def test_schedulers_pick_different_ranks_with_sync() -> None:
    """Requests that alternate between two services spread over all ranks, as with one service."""
    a, b = Service("a"), Service("b")
    picks = []
    for service, other in ((a, b), (b, a), (a, b), (b, a)):
        picks.append(service.place()[1:])
        service.send_to(other)

    assert sorted(prefill for prefill, _ in picks) == list(range(RANKS))
    assert sorted(decode_rank for _, decode_rank in picks) == list(range(RANKS))


def test_schedulers_pick_the_same_ranks_without_sync() -> None:
    """This is what the exchange is there for."""
    a, b = Service("a"), Service("b")

    assert [service.place()[1:] for service in (a, a)] == [service.place()[1:] for service in (b, b)]


def test_both_schedulers_have_the_same_load() -> None:
    """A peer's request adds the same load to every rank as at its own service, from the pick to its end."""
    a, b = Service("a"), Service("b")
    attempts = [a.place()[0] for _ in range(6)]
    a.send_to(b)
    assert b.loads() == [pytest.approx(loads) for loads in a.loads()]
    assert b.requests() == a.requests() == [6, 6]

    for service in (a, b):
        service.fleet.clock.now += 0.5
    for attempt in attempts[:3]:
        attempt.prefill_answered(200, a.fleet.clock())
    attempts[0].first_byte(200, a.fleet.clock())
    attempts[1].end(a.fleet.clock())
    a.send_to(b)
    assert b.loads() == [pytest.approx(loads) for loads in a.loads()]
    assert b.requests() == a.requests() == [3, 5]

    for attempt in attempts:
        attempt.end(a.fleet.clock())
    a.send_to(b)
    assert b.requests() == a.requests() == [0, 0]
    assert b.loads() == [[0.0] * RANKS] * 2


def test_load_of_a_peer_ends_with_the_peer() -> None:
    """A replica that died with open requests leaves no load on others."""
    a, b = Service("a"), Service("b")
    for _ in range(5):
        a.place()
    a.send_to(b)
    assert b.requests() == [5, 5]
    b.peers.review(b.fleet.clock() + 3.0)

    assert b.requests() == [0, 0]


def test_own_load_stays_when_a_peer_is_gone() -> None:
    """The requests of the peer were behind ours in every queue; when they end, ours are not computed yet."""
    a, b = Service("a"), Service("b")
    for _ in range(3 * RANKS):
        b.place()
    before = b.loads()
    for _ in range(RANKS):
        a.place()
    a.send_to(b)
    b.peers.review(b.fleet.clock() + 3.0)

    assert b.requests() == [3 * RANKS, 3 * RANKS]
    assert b.loads() == [pytest.approx(loads) for loads in before]


def test_failed_prefill_of_a_peer_is_no_step() -> None:
    """An error is sent as the end of the attempt, and not before."""
    a, b = Service("a"), Service("b")
    attempts = [a.place()[0] for _ in range(3 * RANKS)]
    attempts[-1].prefill_answered(500, a.fleet.clock())
    a.send_to(b)
    assert b.requests() == [3 * RANKS, 3 * RANKS]
    attempts[-1].end(a.fleet.clock())
    a.send_to(b)

    assert b.loads() == [pytest.approx(loads) for loads in a.loads()]
    assert sum(b.loads()[0]) == pytest.approx(
        10 * 2000 + 500, rel=0.01
    )  # the first one of all runs, and the rest waits


def test_prefix_is_found_through_any_replica() -> None:
    """A prompt that one replica has sent is cached there for the other, also after the first request is over."""
    a, b = Service("a"), Service("b")
    other, other_rank, _ = a.place()
    attempt, rank, _ = a.place(chat("the same"))
    for each in (other, attempt):
        each.end(a.fleet.clock())
    a.send_to(b)

    assert rank != other_rank  # which is the one that it would have taken by itself
    assert {b.place(chat("the same"))[1] for _ in range(3)} == {rank}


def test_all_replicas_estimate_the_token_ratio() -> None:
    """The engine counts for all four, and each has sent a fourth: two bytes are a token, not half a byte."""
    services = [Service(name) for name in "abcd"]
    host = services[0].fleet.endpoint(Role.PREFILL)
    counted = 0
    for second in range(100):
        for service in services:
            attempt, _, _ = service.place()
            attempt.prefill_answered(200, service.fleet.clock())
            attempt.end(service.fleet.clock())
            counted += 8000 // 2
        for service in services:
            service.send_to(*(other for other in services if other is not service))
        for service in services:
            page = LoadPage((RankSample(0, 0, age=0.0),), prompt_tokens=counted)
            service.fleet.clock.now = 1000.0 + second
            service.fleet.load.sampled(host.configured, page, service.fleet.clock(), service.fleet.clock())

    ratios = [service.fleet.load.ratios["*"].bytes_per_token for service in services]
    assert ratios == [pytest.approx(2.0, rel=0.05)] * 4


def test_picks_are_counted_at_one_replica() -> None:
    """The counters of all replicas add up: the picks of a peer are not counted here again."""
    a, b = Service("a"), Service("b")
    for _ in range(5):
        a.place()
    a.send_to(b)

    assert [sum(rank.picks for rank in service.fleet.endpoint(Role.PREFILL).ranks) for service in (a, b)] == [5, 0]


def test_peer_attempt_is_ignored_on_an_unknown_rank() -> None:
    """While an engine is replaced by a larger one, one replica may know it before the other does."""
    large, small = Service("large", prefill_ranks=8), Service("small", prefill_ranks=2)
    for _ in range(8):
        large.place()
    large.send_to(small)

    assert large.requests() == [8, 8]
    assert small.requests() == [2, 8]
