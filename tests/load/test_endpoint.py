"""The load cache counts own and foreign load once each."""

from dataclasses import replace

import pytest

from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import LoadPage, RankSample, Role
from dp_extproc.estimators.decode_pace import ALIKE
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.endpoint import DEFAULT_HEALTH, Freshness, StepCosts, compare_pace
from dp_extproc.load.in_flight import InFlight
from dp_extproc.prefix_cache.blocks import Prefix
from fleet_fixtures import Fleet, make_facts, samples

PREFILL, DECODE = make_facts(Role.PREFILL), make_facts(Role.DECODE)


@pytest.fixture
def fleet() -> Fleet:
    """A fleet where tokens are all that counts on decode."""
    return Fleet(prefills=[PREFILL], decodes=[DECODE], costs=StepCosts(decode_request=0))


def test_a_reservation_counts_at_once(fleet: Fleet) -> None:
    """What was just sent counts before any scrape has seen it."""
    host = fleet.host(Role.DECODE)
    host.reserve(2, 500, fleet.clock())

    assert [rank.tokens for rank in host.ranks] == [0, 0, 500, 0]


def test_load_of_others_adds_to_our_own(fleet: Fleet) -> None:
    """What a sample shows beyond our books is the load of others, on top of ours."""
    host = fleet.host(Role.DECODE)
    fleet.clock.now += 1
    host.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    fleet.sample(host.configured, [700, 0, 0, 90])

    assert [rank.tokens for rank in host.ranks] == [700, 0, 0, 90]
    assert [rank.external_tokens for rank in host.ranks] == [200, 0, 0, 90]


def test_a_sample_taken_before_a_pick_does_not_erase_it(fleet: Fleet) -> None:
    """A page that was sampled before a request was sent says nothing of it, even if it arrives later."""
    host = fleet.host(Role.DECODE)
    fleet.clock.now += 1
    host.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    fleet.sample(host.configured, [300, 0, 0, 0], age=1.5)

    assert host.ranks[0].tokens == 800


def test_a_request_that_ended_after_the_sample_is_not_taken_for_load_of_others(fleet: Fleet) -> None:
    """A sample that still counts a request of ours that is over by now leaves nothing behind."""
    host = fleet.host(Role.DECODE)
    fleet.clock.now += 1
    (reservation,) = host.reserve(0, 500, fleet.clock())
    fleet.clock.now += 2
    reservation.complete(fleet.clock())
    fleet.sample(host.configured, [500, 0, 0, 0], age=1.0)

    assert host.ranks[0].tokens == 0


def test_a_request_that_ended_before_the_sample_explains_nothing_in_it(fleet: Fleet) -> None:
    """Load that shows after ours was over is the load of others."""
    host = fleet.host(Role.DECODE)
    (reservation,) = host.reserve(0, 500, fleet.clock())
    fleet.clock.now += 1
    reservation.complete(fleet.clock())
    fleet.clock.now += 1
    fleet.sample(host.configured, [400, 0, 0, 0])

    assert host.ranks[0].tokens == 400


def test_a_gauge_that_shows_less_than_our_books_erases_nothing(fleet: Fleet) -> None:
    """A gauge of used tokens leaves out queued work; our own queued requests count all the same."""
    host = fleet.host(Role.DECODE)
    host.reserve(1, 800, fleet.clock())
    fleet.clock.now += 1
    page = LoadPage((RankSample(1, used_tokens=100, age=0.0),))
    fleet.load.sampled(host.configured, page, fleet.clock(), fleet.clock())

    assert host.ranks[1].tokens == 800


def test_a_reservation_is_released_once(fleet: Fleet) -> None:
    """Every way out may release; the books move once, and are exactly zero with nothing in flight."""
    host = fleet.host(Role.DECODE)
    reservations = [host.reserve(3, 0.1 * n, fleet.clock())[0] for n in range(1, 20)]
    for reservation in (*reservations, *reservations):
        reservation.complete(fleet.clock())

    assert host.ranks[3].reserved_tokens == 0
    assert host.ranks[3].reserved_requests == 0


def test_a_rank_that_the_engine_picks_is_shared_by_all(fleet: Fleet) -> None:
    """Nobody outside knows the rank, so each carries an even share, and none counts as picked."""
    host = fleet.host(Role.DECODE)
    reservations = host.reserve(None, 400, fleet.clock())

    assert [rank.tokens for rank in host.ranks] == [100, 100, 100, 100]
    assert host.requests == 1
    assert [rank.picks for rank in host.ranks] == [0, 0, 0, 0]
    for reservation in reservations:
        reservation.complete(fleet.clock())
    assert host.tokens == 0


class TestGaugesWithoutTimeStamps:
    """Pages of /metrics do not tell when a value was taken."""

    def test_an_unchanged_gauge_explains_no_newer_requests(self, fleet: Fleet) -> None:
        """A frozen gauge stays a sample of the past: what was sent since is on top of it."""
        host = fleet.host(Role.DECODE)
        fleet.sample(host.configured, [600, 0, 0, 0], age=None)
        fleet.clock.now += 1
        fleet.sample(host.configured, [600, 0, 0, 1], age=None)
        fleet.clock.now += 1
        host.reserve(0, 500, fleet.clock())
        fleet.clock.now += 1
        fleet.sample(host.configured, [600, 0, 0, 1], age=None)
        fleet.clock.now += 1
        fleet.sample(host.configured, [600, 0, 0, 1], age=None)

        assert host.ranks[0].tokens == 1100

    def test_a_changed_gauge_is_younger_than_the_page_before(self, fleet: Fleet) -> None:
        """A value that moved was taken after the page before was; what had been sent by then is in it."""
        host = fleet.host(Role.DECODE)
        fleet.sample(host.configured, [0, 0, 0, 0], age=None)
        host.reserve(0, 500, fleet.clock())
        fleet.clock.now += 1
        fleet.sample(host.configured, [0, 0, 0, 0], age=None)
        fleet.clock.now += 1
        fleet.sample(host.configured, [600, 0, 0, 0], age=None)

        assert host.ranks[0].external_tokens == 100


class TestFreshness:
    """Three states, each with its rule."""

    def _two(self) -> Fleet:
        return Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE], sampled=False)

    def test_states(self) -> None:
        """Unknown before the first sample, fresh after it, stale when it has grown old."""
        fleet = self._two()
        host = fleet.host(Role.PREFILL)
        states = [host.freshness(fleet.clock(), 5.0)]
        fleet.sample(host.configured, [0] * 4)
        states.append(host.freshness(fleet.clock(), 5.0))
        fleet.clock.now += 5.1
        states.append(host.freshness(fleet.clock(), 5.0))

        assert states == [Freshness.UNKNOWN, Freshness.FRESH, Freshness.STALE]

    def test_a_fresh_host_is_preferred_however_loaded(self) -> None:
        """A host that is known to be loaded gets the request, not one that nothing is known of."""
        fleet = self._two()
        fleet.sample(fleet.host(Role.PREFILL, 2).configured, [90_000] * 4)

        assert fleet.load.eligible("*", Role.PREFILL, fleet.clock()) == [fleet.host(Role.PREFILL, 2)]

    def test_a_stale_host_is_preferred_to_an_unknown_one(self) -> None:
        """Old knowledge is better than none."""
        fleet = self._two()
        fleet.sample(fleet.host(Role.PREFILL, 2).configured, [0] * 4)
        fleet.clock.now += 60

        assert fleet.load.eligible("*", Role.PREFILL, fleet.clock()) == [fleet.host(Role.PREFILL, 2)]

    @pytest.mark.parametrize("sampled", [True, False], ids=["stale", "unknown"])
    def test_a_lone_host_is_used(self, sampled: bool) -> None:
        """With nothing better there is, it gets the request."""
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], sampled=sampled)
        fleet.clock.now += 60

        assert fleet.load.eligible("*", Role.PREFILL, fleet.clock()) == [fleet.host(Role.PREFILL)]

    def test_a_host_that_refuses_connections_is_stale_at_once(self) -> None:
        """There is no need to wait for the sample of a dead server to grow old; one good page brings it back."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        dead = fleet.host(Role.PREFILL, 1)
        fleet.load.failed(dead.configured, EngineFailure(FailureKind.REFUSED, "refused"), fleet.clock())
        without = fleet.load.eligible("*", Role.PREFILL, fleet.clock())
        fleet.sample(dead.configured, [0] * 4)

        assert without == [fleet.host(Role.PREFILL, 2)]
        assert dead in fleet.load.eligible("*", Role.PREFILL, fleet.clock())

    def test_who_answers_requests_is_known_well(self) -> None:
        """Its page may be broken, or slow under load: turning away from it would cost a server."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        answering, silent = fleet.host(Role.PREFILL, 1), fleet.host(Role.PREFILL, 2)
        attempts = [
            InFlight(number, fleet.clock(), host.reserve(0, 100, fleet.clock()), (), prefill_endpoint=host)
            for number, host in enumerate((answering, silent))
        ]
        fleet.clock.now += 4
        attempts[0].prefill_answered(200, fleet.clock())
        attempts[1].end(fleet.clock())
        fleet.clock.now += 4

        assert fleet.load.eligible("*", Role.PREFILL, fleet.clock()) == [answering]
        assert [answering.freshness(fleet.clock() + after, 5.0) for after in (0, 2)] == [
            Freshness.FRESH,
            Freshness.STALE,
        ]

    def test_a_single_failed_scrape_changes_nothing(self) -> None:
        """A slow page is no reason to turn away: the last sample is still young."""
        fleet = Fleet(prefills=[PREFILL, PREFILL], decodes=[DECODE])
        slow = fleet.host(Role.PREFILL, 1)
        fleet.load.failed(slow.configured, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())

        assert slow in fleet.load.eligible("*", Role.PREFILL, fleet.clock())


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize(
    ("kind", "seconds", "is_forgotten"),
    [(FailureKind.TIMEOUT, 4, False), (FailureKind.TIMEOUT, 6, True), (FailureKind.REFUSED, 1, True)],
)
def test_what_others_cause_is_forgotten_when_it_was_told_long_ago(
    role: Role, kind: FailureKind, seconds: float, is_forgotten: bool
) -> None:
    """A queue of others on rank 0, and a page that fails ever since: it must not keep requests away for good.

    What we sent stays on the books, and the next page tells of others again.
    """
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    host = fleet.host(role)
    fleet.sample(host.configured, [20_000, 0, 0, 0])
    told = host.tokens
    host.reserve(1, 300, fleet.clock())
    own = host.tokens - told
    fleet.clock.now += seconds
    fleet.load.failed(host.configured, EngineFailure(kind, "away"), fleet.clock())
    after, requests = host.tokens, host.requests
    fleet.sample(host.configured, [20_000, 300, 0, 0])

    assert after == (own if is_forgotten else told + own)
    assert requests == (1 if is_forgotten else 2)
    assert host.ranks[0].tokens == told


def test_a_restarted_engine_starts_with_empty_books(fleet: Fleet) -> None:
    """An engine that has become another one owes nothing; releases of its former life disturb nothing."""
    before = fleet.host(Role.PREFILL)
    (reservation,) = before.reserve(0, 500, fleet.clock())
    fleet.load.discovered(before.configured, "10.0.0.1:31001", make_facts(Role.PREFILL, ranks=2), fleet.clock())
    after = fleet.host(Role.PREFILL)
    reservation.complete(fleet.clock())

    assert len(after.ranks) == 2
    assert after.tokens == 0


def test_ranks_that_the_server_does_not_have_are_left_out(fleet: Fleet) -> None:
    """A load page cannot invent ranks."""
    fleet.sample(fleet.host(Role.PREFILL).configured, [1, 2, 3, 4, 5, 6])

    assert [rank.tokens for rank in fleet.host(Role.PREFILL).ranks] == [1, 2, 3, 4]


def test_a_server_in_another_role_gets_nothing() -> None:
    """A decode server among the prefill endpoints would leave every request hanging, so it is passed over."""
    fleet = Fleet(prefills=[PREFILL, DECODE], decodes=[DECODE])

    assert fleet.load.eligible("*", Role.PREFILL, fleet.clock()) == [fleet.host(Role.PREFILL, 1)]


def test_a_rank_that_is_never_sampled_remembers_no_more_and_more(fleet: Fleet) -> None:
    """Without samples what is over is forgotten some time, or hours of traffic would fill the memory."""
    rank = fleet.host(Role.DECODE).ranks[0]
    for number in range(30_000):
        rank.reserve(1, number).complete(number)

    assert len(rank.ended) <= 10_000
    assert rank.tokens == 0


class TestAnAbsurdPace:
    """An engine's gauge of its throughput may be anything; ten decode servers, of which the last one tells nonsense."""

    @staticmethod
    def _fleet(absurd: float) -> Fleet:
        fleet = Fleet(prefills=[PREFILL], decodes=[DECODE] * 10)
        for number in range(1, 11):
            host = fleet.host(Role.DECODE, number)
            rate = 500.0 if number < 10 else absurd  # 20 ms for each token of ten sequences
            page = LoadPage((RankSample(0, 0, running_requests=10, tokens_per_second=rate, age=0.0),))
            for _ in range(200):
                fleet.load.sampled(host.configured, page, fleet.clock(), fleet.clock())
        compare_pace(fleet.load.eligible("*", Role.DECODE, fleet.clock()))
        return fleet

    @pytest.mark.parametrize("rate", [1e9, 1e-9])
    def test_it_makes_no_absurd_load(self, rate: float) -> None:
        """What a sequence of 300 tokens grows by in ten seconds is within four times of what it is elsewhere."""
        fleet = self._fleet(rate)
        loads = []
        for number in (1, 10):
            host = fleet.host(Role.DECODE, number)
            (reservation,) = host.reserve(1, 300, fleet.clock())
            reservation.first_token(fleet.clock())
            host.groups[0].refresh(fleet.clock() + 10)
            loads.append(host.ranks[1].tokens - 1300)

        assert loads[0] == pytest.approx(500)
        assert 125 - 1 <= loads[1] <= 2000 + 1

    @pytest.mark.parametrize("rate", [1e9, 1e-9])
    def test_it_makes_no_server_much_better(self, rate: float) -> None:
        """Nor much worse: by two, against an average that it moves itself."""
        fleet = self._fleet(rate)
        slowness = [self._slowness(fleet, number) for number in (1, 10)]

        assert 0.4 <= slowness[1] / slowness[0] <= 3

    @pytest.mark.parametrize(
        ("rate", "seconds", "slowness"), [(1e-9, 5.0, 1.5), (250.0, 10.0, 1.8), (125.0, 10.0, 2.0)]
    )
    def test_our_own_clock_has_the_last_word(self, rate: float, seconds: float, slowness: float) -> None:
        """Whose sequences last as long as those of the others is not slow; whose last twice as long, may be."""
        fleet = self._fleet(rate)
        for number in range(1, 11):
            for _ in range(60):
                (reservation,) = fleet.host(Role.DECODE, number).reserve(0, 300, fleet.clock())
                reservation.first_token(fleet.clock())
                reservation.complete(fleet.clock() + (seconds if number == 10 else 5.0))
        compare_pace(fleet.load.eligible("*", Role.DECODE, fleet.clock()))

        assert self._slowness(fleet, 10) == pytest.approx(slowness / ALIKE, rel=0.02)

    @pytest.mark.parametrize("rate", [455.0, 550.0])
    def test_a_small_difference_is_none(self, rate: float) -> None:
        """Or an idle server that once was a trifle slower would never be asked again."""
        fleet = self._fleet(rate)

        assert [self._slowness(fleet, number) for number in (1, 10)] == [1.0, 1.0]

    @staticmethod
    def _slowness(fleet: Fleet, number: int) -> float:
        (group,) = fleet.host(Role.DECODE, number).groups
        assert isinstance(group, DecodeGroup)
        return group.slowness


class TestRanksThatEnginesPick:
    """A request is a share on the books of every rank, and in samples wholly on one."""

    @staticmethod
    def _page(told: list[tuple[int, int]], age: float | None = 0.0) -> LoadPage:
        """Ranks that have so many requests with so many tokens in all."""
        return LoadPage(
            tuple(
                RankSample(
                    rank, tokens, total_tokens=tokens, waiting_uncached_tokens=tokens, running_requests=count, age=age
                )
                for rank, (count, tokens) in enumerate(told)
            )
        )

    @pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
    @pytest.mark.parametrize(
        ("told", "others"),
        [
            ([(4, 4000), (0, 0), (0, 0), (0, 0)], 0),
            ([(1, 1000), (2, 2000), (1, 1000), (0, 0)], 0),
            ([(8, 8000), (0, 0), (4, 4000), (0, 0)], 8),
        ],
        ids=["all on one", "spread", "with others"],
    )
    def test_they_are_no_strangers(self, fleet: Fleet, role: Role, told: list[tuple[int, int]], others: float) -> None:
        """Four requests of ours of 1000 tokens each, wherever they are."""
        host = fleet.host(role)
        for _ in range(4):
            host.reserve(None, 1000, fleet.clock())
        fleet.clock.now += 1
        fleet.load.sampled(host.configured, self._page(told), fleet.clock(), fleet.clock())

        assert sum(rank.external_requests for rank in host.ranks) == pytest.approx(others)
        assert sum(rank.external_tokens for rank in host.ranks) == pytest.approx(others * 1000)

    def test_one_empty_rank_has_lost_nothing(self, fleet: Fleet) -> None:
        """It never had what another one works on; a server that is empty altogether has."""
        host = fleet.host(Role.DECODE)
        host.reserve(None, 1000, fleet.clock())
        fleet.clock.now += 60
        fleet.load.sampled(
            host.configured, self._page([(1, 1000), (0, 0), (0, 0), (0, 0)]), fleet.clock(), fleet.clock()
        )
        before = host.requests
        fleet.load.sampled(host.configured, self._page([(0, 0)] * 4), fleet.clock(), fleet.clock())

        assert (before, host.requests) == (1, 0)

    def test_a_large_batch_in_shares_says_nothing_of_others(self, fleet: Fleet) -> None:
        """Four sequences for each rank; its answer is no answer of what was before it in each queue, but one step."""
        host = fleet.host(Role.PREFILL)
        before = [host.reserve(rank, 30_000, fleet.clock())[0] for rank in range(4) for _ in range(2)]
        batch = host.reserve(None, 16_000, fleet.clock(), requests=16)
        fleet.clock.now += 1
        for share in batch:
            share.complete(fleet.clock())

        assert not any(reservation.until < fleet.clock() for reservation in before)
        assert host.requests == 8
        assert host.tokens == pytest.approx(4 * 60_000 - 5 * 8192 + 4 * 2048)  # one rank's chunk had run before

    def test_every_share_starts_on_an_idle_server(self, fleet: Fleet) -> None:
        """One of them is the request; that would start at once."""
        host = fleet.host(Role.PREFILL)
        host.reserve(None, 4000, fleet.clock())

        assert [rank.tokens for rank in host.ranks] == [250] * 4


class TestPrefixesOfARestartedEngine:
    """A new process has an empty prefix cache, whatever it says of itself."""

    PREFIX = Prefix((1, 2), (500, 1000))

    def _held(self, fleet: Fleet) -> float:
        host = fleet.host(Role.PREFILL)
        return fleet.load.prefixes["*"].held(self.PREFIX, 1000).by_slot.get(host.ranks[1], 0.0)

    def test_a_refused_connection_tells_of_one(self, fleet: Fleet) -> None:
        """Nobody listens any more; a slow page alone tells nothing."""
        host = fleet.host(Role.PREFILL)
        fleet.load.prefixes["*"].note(host.ranks[1], self.PREFIX, 1000, None)
        fleet.load.failed(host.configured, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())
        before = self._held(fleet)
        fleet.load.failed(host.configured, EngineFailure(FailureKind.REFUSED, "refused"), fleet.clock())

        assert (before, self._held(fleet)) == (1000, 0)

    @pytest.mark.parametrize("field", ["prompt_tokens", "uncached_prompt_tokens"])
    def test_a_count_that_went_down_tells_of_one(self, fleet: Fleet, field: str) -> None:
        """Running counts only grow while a process lives; a page that does not tell one changes nothing."""
        host = fleet.host(Role.PREFILL)
        held = []
        for count in (70_000, 90_000, None, 500):
            page = replace(LoadPage(samples([0] * 4)), **{field: count})  # type: ignore[arg-type]
            if count != 500:
                fleet.load.prefixes["*"].note(host.ranks[1], self.PREFIX, 1000, None)
            fleet.load.sampled(host.configured, page, fleet.clock(), fleet.clock())
            held.append(self._held(fleet))

        assert held == [1000, 1000, 1000, 0]


BESIDE = {"page_was_read": True}


@pytest.mark.parametrize(
    ("failures", "comes_back"),
    [
        pytest.param([EngineFailure(FailureKind.DISAGREEMENT, "dp_size", **BESIDE)], False, id="a-disagreement"),
        pytest.param([EngineFailure(FailureKind.HTTP_STATUS, "/server_info", **BESIDE)], False, id="facts-fail"),
        pytest.param([EngineFailure(FailureKind.TIMEOUT, "/server_info", **BESIDE)], False, id="facts-hang"),
        pytest.param([EngineFailure(FailureKind.WRONG_SHAPE, "a bad number")], False, id="a-bad-page"),
        pytest.param([EngineFailure(FailureKind.HTTP_STATUS, "500")], False, id="an-error"),
        pytest.param([EngineFailure(FailureKind.REFUSED, "no connection")], True, id="no-connection"),
        pytest.param([EngineFailure(FailureKind.TIMEOUT, "/v1/loads")], True, id="no-answer"),
        pytest.param([EngineFailure(FailureKind.UNRESOLVABLE, "no address")], True, id="no-address"),
        pytest.param(
            [EngineFailure(FailureKind.REFUSED, "no connection"), EngineFailure(FailureKind.HTTP_STATUS, "503")],
            True,
            id="away-and-starting",
        ),
    ],
)
def test_only_who_could_not_be_reached_comes_back(failures: list[EngineFailure], comes_back: bool) -> None:
    """Trouble that stands beside load pages that are read tells nothing of requests, and forgives nothing."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE])
    host = fleet.host(Role.DECODE)
    for _ in range(DEFAULT_HEALTH.consecutive_failures):
        host.health.failed(fleet.clock())
    for _ in range(3):
        for failure in failures:
            fleet.load.failed(host.configured, failure, fleet.clock())
        fleet.sample(host.configured, [0] * 4)

    assert host.health.is_ejected(fleet.clock()) is not comes_back
    assert bool(fleet.load.unhealthy) is not comes_back
