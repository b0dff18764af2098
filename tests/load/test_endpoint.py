"""The load cache counts reserved and external load once each."""

from dataclasses import replace

import pytest

from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import LoadPage, RankSample, Role
from dp_extproc.estimators.decode_pace import ALIKE
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.endpoint import DEFAULT_HEALTH, Freshness, StepCosts
from dp_extproc.load.in_flight import InFlight
from dp_extproc.load.neighbours import compare_pace
from dp_extproc.prefix_cache.blocks import Prefix
from fleet_fixtures import Fleet, make_facts, samples

PREFILL, DECODE = make_facts(Role.PREFILL), make_facts(Role.DECODE)


@pytest.fixture
def fleet() -> Fleet:
    """Make a fleet where tokens are all that counts on decode."""
    return Fleet(prefills=[PREFILL], decodes=[DECODE], costs=StepCosts(decode_request=0))


def test_a_reservation_counts_at_once(fleet: Fleet) -> None:
    """A new request counts before any sample has it."""
    endpoint = fleet.endpoint(Role.DECODE)
    endpoint.reserve(2, 500, fleet.clock())

    assert [rank.tokens for rank in endpoint.ranks] == [0, 0, 500, 0]


def test_external_load_is_added_to_reservations(fleet: Fleet) -> None:
    """What a sample has beyond the reservations is external."""
    endpoint = fleet.endpoint(Role.DECODE)
    fleet.clock.now += 1
    endpoint.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    fleet.sample(endpoint.configured, [700, 0, 0, 90])

    assert [rank.tokens for rank in endpoint.ranks] == [700, 0, 0, 90]
    assert [rank.external_tokens for rank in endpoint.ranks] == [200, 0, 0, 90]


def test_a_sample_taken_before_a_pick_does_not_erase_it(fleet: Fleet) -> None:
    """A sample cannot contain a later request, even if its page arrives after the pick."""
    endpoint = fleet.endpoint(Role.DECODE)
    fleet.clock.now += 1
    endpoint.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    fleet.sample(endpoint.configured, [300, 0, 0, 0], age=1.5)

    assert endpoint.ranks[0].tokens == 800


def test_a_request_that_ended_after_the_sample_is_no_external_load(fleet: Fleet) -> None:
    """A sample that still has a request of ours, which has ended by now, leaves no load behind."""
    endpoint = fleet.endpoint(Role.DECODE)
    fleet.clock.now += 1
    (reservation,) = endpoint.reserve(0, 500, fleet.clock())
    fleet.clock.now += 2
    reservation.complete(fleet.clock())
    fleet.sample(endpoint.configured, [500, 0, 0, 0], age=1.0)

    assert endpoint.ranks[0].tokens == 0


def test_a_request_that_ended_before_the_sample_explains_no_load(fleet: Fleet) -> None:
    """Load in a sample after the end of ours is external."""
    endpoint = fleet.endpoint(Role.DECODE)
    (reservation,) = endpoint.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    reservation.complete(fleet.clock())
    fleet.clock.now += 1
    fleet.sample(endpoint.configured, [400, 0, 0, 0])

    assert endpoint.ranks[0].tokens == 400


def test_a_gauge_below_the_reservations_takes_nothing_back(fleet: Fleet) -> None:
    """A gauge of used tokens leaves out queued work, and our queued requests count all the same."""
    endpoint = fleet.endpoint(Role.DECODE)
    endpoint.reserve(1, 800, fleet.clock())
    fleet.clock.now += 1
    page = LoadPage((RankSample(1, used_tokens=100, age=0.0),))
    fleet.load.sampled(endpoint.configured, page, fleet.clock(), fleet.clock())

    assert endpoint.ranks[1].tokens == 800


@pytest.mark.parametrize(
    ("waiting", "answered", "external"), [(1, False, None), (1, True, True), (2, False, True), (0, False, False)]
)
def test_a_page_may_show_requests_that_count_as_computed(
    fleet: Fleet, waiting: int, answered: bool, external: bool | None
) -> None:
    """Another response has shown that a prompt is computed, but only its own event ends it. Both may be too early."""
    endpoint = fleet.endpoint(Role.PREFILL)
    (silent,), (later,) = (endpoint.reserve(1, 500, fleet.clock()) for _ in range(2))
    later.complete(fleet.clock.now + 1)  # first in, first out
    if answered:
        silent.complete(fleet.clock.now + 2)
    fleet.clock.now += 3
    sample = RankSample(1, 0, total_tokens=500 * waiting, waiting_requests=waiting, age=0.5)
    endpoint.absorb((sample,), fleet.clock(), fleet.clock())

    assert endpoint.has_external_requests is external


def test_a_reservation_ends_once(fleet: Fleet) -> None:
    """Every way out may end it; the load changes once, and is exactly zero with nothing in flight."""
    endpoint = fleet.endpoint(Role.DECODE)
    reservations = [endpoint.reserve(3, 0.1 * n, fleet.clock())[0] for n in range(1, 20)]
    for reservation in (*reservations, *reservations):
        reservation.complete(fleet.clock())

    assert endpoint.ranks[3].reserved_tokens == 0
    assert endpoint.ranks[3].reserved_requests == 0


def test_all_ranks_share_a_request_whose_rank_the_engine_picks(fleet: Fleet) -> None:
    """The rank is unknown, so each has an equal share, and none counts as picked."""
    endpoint = fleet.endpoint(Role.DECODE)
    reservations = endpoint.reserve(None, 400, fleet.clock())

    assert [rank.tokens for rank in endpoint.ranks] == [100, 100, 100, 100]
    assert endpoint.requests == 1
    assert [rank.picks for rank in endpoint.ranks] == [0, 0, 0, 0]
    for reservation in reservations:
        reservation.complete(fleet.clock())
    assert endpoint.tokens == 0


class TestGaugesWithoutTimeStamps:
    """Pages of /metrics do not report when a value was taken."""

    def test_an_unchanged_gauge_explains_no_newer_requests(self, fleet: Fleet) -> None:
        """A gauge that stands still stays a sample of the past, which has no later request."""
        endpoint = fleet.endpoint(Role.DECODE)
        fleet.sample(endpoint.configured, [600, 0, 0, 0], age=None)
        fleet.clock.now += 1
        fleet.sample(endpoint.configured, [600, 0, 0, 1], age=None)
        fleet.clock.now += 1
        endpoint.reserve(0, 500, fleet.clock())
        fleet.clock.now += 1
        fleet.sample(endpoint.configured, [600, 0, 0, 1], age=None)
        fleet.clock.now += 1
        fleet.sample(endpoint.configured, [600, 0, 0, 1], age=None)

        assert endpoint.ranks[0].tokens == 1100

    def test_a_changed_gauge_is_younger_than_the_page_before(self, fleet: Fleet) -> None:
        """A value that has changed was taken after the page before, and has the requests until then."""
        endpoint = fleet.endpoint(Role.DECODE)
        fleet.sample(endpoint.configured, [0, 0, 0, 0], age=None)
        endpoint.reserve(0, 500, fleet.clock())
        fleet.clock.now += 1
        fleet.sample(endpoint.configured, [0, 0, 0, 0], age=None)
        fleet.clock.now += 1
        fleet.sample(endpoint.configured, [600, 0, 0, 0], age=None)

        assert endpoint.ranks[0].external_tokens == 100


class TestFreshness:
    """Each of the three states has its rule."""

    def _two(self) -> Fleet:
        return Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE], sampled=False)

    def test_freshness_has_three_states(self) -> None:
        """An endpoint is unknown before the first sample, fresh after it, and stale when it has grown old."""
        fleet = self._two()
        endpoint = fleet.endpoint(Role.PREFILL)
        states = [endpoint.freshness(fleet.clock(), 5.0)]
        fleet.sample(endpoint.configured, [0] * 4)
        states.append(endpoint.freshness(fleet.clock(), 5.0))
        fleet.clock.now += 5.1
        states.append(endpoint.freshness(fleet.clock(), 5.0))

        assert states == [Freshness.UNKNOWN, Freshness.FRESH, Freshness.STALE]

    def test_a_fresh_endpoint_is_preferred_however_loaded(self) -> None:
        """A loaded endpoint gets the request rather than one of unknown load."""
        fleet = self._two()
        fleet.sample(fleet.endpoint(Role.PREFILL, 2).configured, [90_000] * 4)

        assert fleet.eligible(Role.PREFILL) == [fleet.endpoint(Role.PREFILL, 2)]

    def test_a_stale_endpoint_is_preferred_to_an_unknown_one(self) -> None:
        """An old sample is better than none."""
        fleet = self._two()
        fleet.sample(fleet.endpoint(Role.PREFILL, 2).configured, [0] * 4)
        fleet.clock.now += 60

        assert fleet.eligible(Role.PREFILL) == [fleet.endpoint(Role.PREFILL, 2)]

    @pytest.mark.parametrize("sampled", [True, False], ids=["stale", "unknown"])
    def test_a_lone_endpoint_is_used(self, sampled: bool) -> None:
        """It gets the request, as there is no fresher one."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], sampled=sampled)
        fleet.clock.now += 60

        assert fleet.eligible(Role.PREFILL) == [fleet.endpoint(Role.PREFILL)]

    def test_an_endpoint_that_refuses_connections_is_stale_at_once(self) -> None:
        """The samples of a dead engine need not grow old; one good page makes the endpoint fresh again."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        dead = fleet.endpoint(Role.PREFILL, 1)
        fleet.load.failed(dead.configured, EngineFailure(FailureKind.REFUSED, "refused"), fleet.clock())
        without = fleet.eligible(Role.PREFILL)
        fleet.sample(dead.configured, [0] * 4)

        assert without == [fleet.endpoint(Role.PREFILL, 2)]
        assert dead in fleet.eligible(Role.PREFILL)

    def test_an_endpoint_that_answers_requests_is_fresh(self) -> None:
        """Its page may be broken, or slow under load: without requests an engine would be wasted."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        answering, silent = fleet.endpoint(Role.PREFILL, 1), fleet.endpoint(Role.PREFILL, 2)
        attempts = [
            InFlight(number, fleet.clock(), endpoint.reserve(0, 100, fleet.clock()), (), prefill_endpoint=endpoint)
            for number, endpoint in enumerate((answering, silent))
        ]
        fleet.clock.now += 4
        attempts[0].prefill_answered(200, fleet.clock())
        attempts[1].end(fleet.clock())
        fleet.clock.now += 4

        assert fleet.eligible(Role.PREFILL) == [answering]
        assert [answering.freshness(fleet.clock() + after, 5.0) for after in (0, 2)] == [
            Freshness.FRESH,
            Freshness.STALE,
        ]

    def test_a_single_failed_page_changes_nothing(self) -> None:
        """The last sample is still recent."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        slow = fleet.endpoint(Role.PREFILL, 1)
        fleet.load.failed(slow.configured, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())

        assert slow in fleet.eligible(Role.PREFILL)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize(
    ("kind", "seconds", "is_forgotten"),
    [(FailureKind.TIMEOUT, 4, False), (FailureKind.TIMEOUT, 6, True), (FailureKind.REFUSED, 1, True)],
)
def test_external_load_of_stale_samples_is_dropped(
    role: Role, kind: FailureKind, seconds: float, is_forgotten: bool
) -> None:
    """An external queue on rank 0, and a page that fails ever since, must not keep requests away for good.

    Reservations stay, and the next page may have external load again.
    """
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    endpoint = fleet.endpoint(role)
    fleet.sample(endpoint.configured, [20_000, 0, 0, 0])
    reported = endpoint.tokens
    endpoint.reserve(1, 300, fleet.clock())
    own = endpoint.tokens - reported
    fleet.clock.now += seconds
    fleet.load.failed(endpoint.configured, EngineFailure(kind, "away"), fleet.clock())
    after, requests = endpoint.tokens, endpoint.requests
    fleet.sample(endpoint.configured, [20_000, 300, 0, 0])

    assert after == (own if is_forgotten else reported + own)
    assert requests == (1 if is_forgotten else 2)
    assert endpoint.ranks[0].tokens == reported


def test_a_restarted_engine_starts_without_load(fleet: Fleet) -> None:
    """Reservations on the engine of before end without effect on the new one."""
    before = fleet.endpoint(Role.PREFILL)
    (reservation,) = before.reserve(0, 500, fleet.clock())
    fleet.load.discovered(before.configured, "10.0.0.1:31001", make_facts(Role.PREFILL, ranks=2), fleet.clock())
    after = fleet.endpoint(Role.PREFILL)
    reservation.complete(fleet.clock())

    assert len(after.ranks) == 2
    assert after.tokens == 0


def test_samples_of_unknown_ranks_have_no_effect(fleet: Fleet) -> None:
    """A load page cannot add ranks."""
    fleet.sample(fleet.endpoint(Role.PREFILL).configured, [1, 2, 3, 4, 5, 6])

    assert [rank.tokens for rank in fleet.endpoint(Role.PREFILL).ranks] == [1, 2, 3, 4]


def test_an_engine_in_another_mode_gets_no_request() -> None:
    """A decode engine among the prefill endpoints would never finish its requests."""
    fleet = Fleet(prefills=[PREFILL, DECODE], decodes=[DECODE])

    assert fleet.eligible(Role.PREFILL) == [fleet.endpoint(Role.PREFILL, 1)]


def test_a_rank_without_samples_keeps_a_bounded_number_of_ended_reservations(fleet: Fleet) -> None:
    """Otherwise hours of traffic would fill the memory."""
    rank = fleet.endpoint(Role.DECODE).ranks[0]
    for number in range(30_000):
        rank.reserve(1, number).complete(number)

    assert len(rank.ended) <= 10_000
    assert rank.tokens == 0


class TestAnAbsurdTpot:
    """An engine's gauge of its throughput may be anything; of ten decode engines the last one reports nonsense."""

    @staticmethod
    def _fleet(absurd: float) -> Fleet:
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE] * 10)
        for number in range(1, 11):
            endpoint = fleet.endpoint(Role.DECODE, number)
            rate = 500.0 if number < 10 else absurd  # 20 ms for each token of ten sequences
            page = LoadPage((RankSample(0, 0, running_requests=10, tokens_per_second=rate, age=0.0),))
            for _ in range(200):
                fleet.load.sampled(endpoint.configured, page, fleet.clock(), fleet.clock())
        compare_pace(fleet.eligible(Role.DECODE))
        return fleet

    @pytest.mark.parametrize("rate", [1e9, 1e-9])
    def test_an_absurd_tpot_makes_no_absurd_load(self, rate: float) -> None:
        """The growth of a sequence of 300 tokens in ten seconds is within four times of that elsewhere."""
        fleet = self._fleet(rate)
        loads = []
        for number in (1, 10):
            endpoint = fleet.endpoint(Role.DECODE, number)
            (reservation,) = endpoint.reserve(1, 300, fleet.clock())
            reservation.first_token(fleet.clock())
            endpoint.groups[0].refresh(fleet.clock() + 10)
            loads.append(endpoint.ranks[1].tokens - 1300)

        assert loads[0] == pytest.approx(500)
        assert 125 - 1 <= loads[1] <= 2000 + 1

    @pytest.mark.parametrize("rate", [1e9, 1e-9])
    def test_an_absurd_tpot_makes_no_engine_much_better(self, rate: float) -> None:
        """It becomes no worse, either: by two at most, against an average that it moves itself."""
        fleet = self._fleet(rate)
        slowness = [self._slowness(fleet, number) for number in (1, 10)]

        assert 0.4 <= slowness[1] / slowness[0] <= 3

    @pytest.mark.parametrize(
        ("rate", "seconds", "slowness"), [(1e-9, 5.0, 1.5), (250.0, 10.0, 1.8), (125.0, 10.0, 2.0)]
    )
    def test_durations_of_sequences_bound_the_slowness(self, rate: float, seconds: float, slowness: float) -> None:
        """An engine with sequences as long as those of the others is not slow; with twice as long ones it may be."""
        fleet = self._fleet(rate)
        for number in range(1, 11):
            for _ in range(60):
                (reservation,) = fleet.endpoint(Role.DECODE, number).reserve(0, 300, fleet.clock())
                reservation.first_token(fleet.clock())
                reservation.complete(fleet.clock() + (seconds if number == 10 else 5.0))
        compare_pace(fleet.eligible(Role.DECODE))

        assert self._slowness(fleet, 10) == pytest.approx(slowness / ALIKE, rel=0.02)

    @pytest.mark.parametrize("rate", [455.0, 550.0])
    def test_a_small_difference_counts_as_none(self, rate: float) -> None:
        """Otherwise an idle engine that was a trifle slower would never get a request again."""
        fleet = self._fleet(rate)

        assert [self._slowness(fleet, number) for number in (1, 10)] == [1.0, 1.0]

    @staticmethod
    def _slowness(fleet: Fleet, number: int) -> float:
        (group,) = fleet.endpoint(Role.DECODE, number).groups
        assert isinstance(group, DecodeGroup)
        return group.slowness


class TestRanksThatEnginesPick:
    """A request has a share on each rank, and all of it is in the sample of one."""

    @staticmethod
    def _page(reported: list[tuple[int, int]], age: float | None = 0.0) -> LoadPage:
        """Make a page of ranks that have so many requests with so many tokens in all."""
        return LoadPage(
            tuple(
                RankSample(
                    rank, tokens, total_tokens=tokens, waiting_uncached_tokens=tokens, running_requests=count, age=age
                )
                for rank, (count, tokens) in enumerate(reported)
            )
        )

    @pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
    @pytest.mark.parametrize(
        ("reported", "others"),
        [
            ([(4, 4000), (0, 0), (0, 0), (0, 0)], 0),
            ([(1, 1000), (2, 2000), (1, 1000), (0, 0)], 0),
            ([(8, 8000), (0, 0), (4, 4000), (0, 0)], 8),
        ],
        ids=["all on one", "spread", "with external ones"],
    )
    def test_shares_explain_the_requests_of_any_rank(
        self, fleet: Fleet, role: Role, reported: list[tuple[int, int]], others: float
    ) -> None:
        """Four requests of ours have 1000 tokens each, wherever they are."""
        endpoint = fleet.endpoint(role)
        for _ in range(4):
            endpoint.reserve(None, 1000, fleet.clock())
        fleet.clock.now += 1
        fleet.load.sampled(endpoint.configured, self._page(reported), fleet.clock(), fleet.clock())

        assert sum(rank.external_requests for rank in endpoint.ranks) == pytest.approx(others)
        assert sum(rank.external_tokens for rank in endpoint.ranks) == pytest.approx(others * 1000)

    def test_one_empty_rank_has_lost_nothing(self, fleet: Fleet) -> None:
        """It never had what another one computes; an engine whose ranks are all empty has lost it."""
        endpoint = fleet.endpoint(Role.DECODE)
        endpoint.reserve(None, 1000, fleet.clock())
        fleet.clock.now += 60
        fleet.load.sampled(
            endpoint.configured, self._page([(1, 1000), (0, 0), (0, 0), (0, 0)]), fleet.clock(), fleet.clock()
        )
        before = endpoint.requests
        fleet.load.sampled(endpoint.configured, self._page([(0, 0)] * 4), fleet.clock(), fleet.clock())

        assert (before, endpoint.requests) == (1, 0)

    def test_a_large_batch_in_shares_completes_no_other_requests(self, fleet: Fleet) -> None:
        """Its response is no evidence of what was before it in each queue, but it is one step."""
        endpoint = fleet.endpoint(Role.PREFILL)
        before = [endpoint.reserve(rank, 30_000, fleet.clock())[0] for rank in range(4) for _ in range(2)]
        batch = endpoint.reserve(None, 16_000, fleet.clock(), requests=16)
        fleet.clock.now += 1
        for share in batch:
            share.complete(fleet.clock())

        assert not any(reservation.until < fleet.clock() for reservation in before)
        assert endpoint.requests == 8
        assert endpoint.tokens == pytest.approx(4 * 60_000 - 5 * 8192 + 4 * 2048)  # one rank's chunk had run before

    def test_every_share_starts_on_an_idle_engine(self, fleet: Fleet) -> None:
        """One of them is the request, which would start at once."""
        endpoint = fleet.endpoint(Role.PREFILL)
        endpoint.reserve(None, 4000, fleet.clock())

        assert [rank.tokens for rank in endpoint.ranks] == [250] * 4


class TestPrefixesOfARestartedEngine:
    """A new process has an empty prefix cache, whatever it reports."""

    PREFIX = Prefix((1, 2), (500, 1000))

    def _held(self, fleet: Fleet) -> float:
        endpoint = fleet.endpoint(Role.PREFILL)
        return fleet.load.prefixes["*"].cached(self.PREFIX, 1000).by_rank.get(endpoint.ranks[1], 0.0)

    def test_a_refused_connection_is_evidence_of_a_restart(self, fleet: Fleet) -> None:
        """No process listens any more; a slow page alone is no evidence."""
        endpoint = fleet.endpoint(Role.PREFILL)
        fleet.load.prefixes["*"].note(endpoint.ranks[1], self.PREFIX, 1000, None)
        fleet.load.failed(endpoint.configured, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())
        before = self._held(fleet)
        fleet.load.failed(endpoint.configured, EngineFailure(FailureKind.REFUSED, "refused"), fleet.clock())

        assert (before, self._held(fleet)) == (1000, 0)

    @pytest.mark.parametrize("field", ["prompt_tokens", "uncached_prompt_tokens"])
    def test_a_count_that_went_down_is_evidence_of_a_restart(self, fleet: Fleet, field: str) -> None:
        """Running counts only grow while a process lives; a page without a count changes nothing."""
        endpoint = fleet.endpoint(Role.PREFILL)
        held = []
        for count in (70_000, 90_000, None, 500):
            page = replace(LoadPage(samples([0] * 4)), **{field: count})  # type: ignore[arg-type]
            if count != 500:
                fleet.load.prefixes["*"].note(endpoint.ranks[1], self.PREFIX, 1000, None)
            fleet.load.sampled(endpoint.configured, page, fleet.clock(), fleet.clock())
            held.append(self._held(fleet))

        assert held == [1000, 1000, 1000, 0]


BESIDE = {"page_was_read": True}


@pytest.mark.parametrize(
    ("failures", "recovers"),
    [
        pytest.param([EngineFailure(FailureKind.DISAGREEMENT, "dp_size", **BESIDE)], False, id="a-disagreement"),
        pytest.param([EngineFailure(FailureKind.HTTP_STATUS, "/server_info", **BESIDE)], False, id="facts-fail"),
        pytest.param([EngineFailure(FailureKind.TIMEOUT, "/server_info", **BESIDE)], False, id="facts-hang"),
        pytest.param([EngineFailure(FailureKind.WRONG_SHAPE, "a bad number")], False, id="a-bad-page"),
        pytest.param([EngineFailure(FailureKind.HTTP_STATUS, "500")], False, id="an-error"),
        pytest.param([EngineFailure(FailureKind.REFUSED, "no connection")], True, id="no-connection"),
        pytest.param([EngineFailure(FailureKind.TIMEOUT, "/v1/loads")], True, id="no-response"),
        pytest.param([EngineFailure(FailureKind.UNRESOLVABLE, "no address")], True, id="no-address"),
        pytest.param(
            [EngineFailure(FailureKind.REFUSED, "no connection"), EngineFailure(FailureKind.HTTP_STATUS, "503")],
            True,
            id="away-and-starting",
        ),
    ],
)
def test_an_endpoint_recovers_only_after_it_was_unreachable(failures: list[EngineFailure], recovers: bool) -> None:
    """A failure beside load pages that are read is no evidence of how requests end, and clears no record."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    endpoint = fleet.endpoint(Role.DECODE)
    for _ in range(DEFAULT_HEALTH.consecutive_failures):
        endpoint.health.failed(fleet.clock())
    for _ in range(3):
        for failure in failures:
            fleet.load.failed(endpoint.configured, failure, fleet.clock())
        fleet.sample(endpoint.configured, [0] * 4)

    assert endpoint.health.is_ejected(fleet.clock()) is not recovers
    assert bool(fleet.load.unhealthy) is not recovers
