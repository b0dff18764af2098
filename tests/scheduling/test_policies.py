"""Each policy picks the endpoint and rank of its definition."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from dp_extproc.config import HostPolicy, LoadSignal, PolicySettings, RankPolicy
from dp_extproc.engines.model import Role
from dp_extproc.load.endpoint import Candidate
from dp_extproc.prefix_cache.index import CachedTokens
from dp_extproc.scheduling.policies import NOTHING_CACHED, REACH, Policy
from fleet_fixtures import Fleet, make_facts

LOADS = ([500, 400, 900, 600], [800, 300, 700, 850], [450, 460, 470, 480])
OTHERS = [policy for policy in HostPolicy if policy is not HostPolicy.LOCKSTEP]


def make_policy(
    host: HostPolicy,
    rank: RankPolicy = RankPolicy.MINIMUM_TOKENS,
    *,
    seed: int = 1,
    signal: LoadSignal = LoadSignal.ESTIMATE,
) -> Policy:
    return Policy(PolicySettings(host=host, dp_rank=rank), signal, Random(seed))


def make_candidates(role: Role, loads: Sequence[Sequence[int]]) -> list[Candidate]:
    """Make endpoints with these loads, all of them external."""
    facts = make_facts(role, ranks=len(loads[0]))
    other = make_facts(Role.DECODE if role is Role.PREFILL else Role.PREFILL)
    prefills, decodes = ([facts] * len(loads), [other]) if role is Role.PREFILL else ([other], [facts] * len(loads))
    fleet = Fleet(prefills=prefills, decodes=decodes)
    hosts = [fleet.endpoint(role, number) for number in range(1, len(loads) + 1)]
    for host, tokens in zip(hosts, loads, strict=True):
        fleet.sample(host.configured, tokens)
    return [host.candidate for host in hosts]


@pytest.fixture
def candidates() -> list[Candidate]:
    """Make three prefill endpoints of four ranks, loaded as in LOADS."""
    return make_candidates(Role.PREFILL, LOADS)


def pick(policy: Policy, candidates: Sequence[Candidate], tokens: float = 100) -> tuple[int, int | None]:
    """Return the number of the candidate, and the rank."""
    chosen, rank = policy.pick(candidates, tokens, 1000.0)
    return candidates.index(chosen), None if rank is None else rank.index


def test_least_tokens_picks_the_least_loaded_rank_of_all_endpoints(candidates: list[Candidate]) -> None:
    """Endpoint 2 has the least loaded rank, although it is the most loaded endpoint."""
    assert pick(make_policy(HostPolicy.LEAST_TOKENS), candidates) == (1, 1)


def test_round_robin_picks_endpoints_in_turn(candidates: list[Candidate]) -> None:
    """Their load does not matter; on each the least loaded rank is picked."""
    policy = make_policy(HostPolicy.ROUND_ROBIN)

    assert [pick(policy, candidates) for _ in range(6)] == [(0, 1), (1, 1), (2, 0)] * 2


def test_round_robin_picks_all_of_many_endpoints_in_turn() -> None:
    """The order holds also where only some are compared for each request."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)] * 60, decodes=[make_facts(Role.DECODE)])
    hosts = fleet.eligible(Role.PREFILL)
    policy = make_policy(HostPolicy.ROUND_ROBIN)
    picks = []
    for _ in range(180):
        near = [host.candidate for host in policy.within_reach(hosts, NOTHING_CACHED)]
        picks.append(policy.pick(near, 100, fleet.clock())[0].endpoint)

    assert picks == 3 * hosts


def test_round_robin_goes_on_when_an_endpoint_leaves(candidates: list[Candidate]) -> None:
    """A turn beyond the endpoints that are left starts over."""
    policy = make_policy(HostPolicy.ROUND_ROBIN, RankPolicy.NONE)
    for _ in range(3):
        pick(policy, candidates)

    assert pick(policy, candidates[:2])[0] in {0, 1}


def test_endpoint_whose_engine_picks_the_rank_is_compared_by_all_ranks() -> None:
    """An idle rank beside a full one is not cheap for a request that may run on either of them."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE, ranks=2)] * 2)
    one, two = hosts = fleet.eligible(Role.DECODE)
    one.reserve(0, 6000, fleet.clock())
    for rank in range(2):
        two.reserve(rank, 2500, fleet.clock())
    candidates = [host.candidate for host in hosts]
    picks = [
        make_policy(HostPolicy.LOCKSTEP, rank).pick(candidates, 2000, fleet.clock())
        for rank in (RankPolicy.NONE, RankPolicy.MINIMUM_TOKENS)
    ]

    assert picks[0] == (two.candidate, None)
    assert picks[1][0] is one.candidate


def test_ties_are_broken_at_random_on_large_engines_too() -> None:
    """Two replicas must not pick 256 idle ranks in the same order."""
    picks = []
    for seed in range(2):
        fleet = Fleet(
            prefills=[make_facts(Role.PREFILL, ranks=256)],
            decodes=[make_facts(Role.DECODE, ranks=256)],
            seed=seed,
        )
        policy = Policy(PolicySettings(), LoadSignal.ESTIMATE, Random(seed))
        (host,) = fleet.eligible(Role.PREFILL)
        own = []
        for _ in range(100):
            _, rank = policy.pick([host.candidate], 9000, fleet.clock())
            assert rank is not None
            assert rank.tokens == 0
            host.reserve(rank.index, 9000, fleet.clock())
            own.append(rank.index)
        picks.append(own)

    assert sum(one == two for one, two in zip(*picks, strict=True)) < 10


def test_random_spreads_over_all_endpoints(candidates: list[Candidate]) -> None:
    """Every endpoint gets about a third."""
    policy = make_policy(HostPolicy.RANDOM, RankPolicy.NONE, seed=3)
    counts = Counter(pick(policy, candidates)[0] for _ in range(3000))

    assert all(900 < counts[index] < 1100 for index in range(3))


def test_power_of_two_never_picks_the_most_loaded_endpoint(candidates: list[Candidate]) -> None:
    """Of two drawn ones, the less loaded is picked, so the most loaded of three never is, and both others are."""
    policy = make_policy(HostPolicy.POWER_OF_TWO, RankPolicy.NONE, seed=3)

    assert {pick(policy, candidates)[0] for _ in range(200)} == {0, 2}


def test_least_requests_picks_the_endpoint_with_the_fewest_per_rank(candidates: list[Candidate]) -> None:
    """Requests count, whatever their tokens: an endpoint with one in flight loses to those without."""
    candidates[2].endpoint.reserve(0, 1, 1000.0)
    candidates[0].endpoint.reserve(0, 1, 1000.0)

    assert pick(make_policy(HostPolicy.LEAST_REQUESTS), candidates) == (1, 1)


def test_least_requests_counts_them_per_rank() -> None:
    """Three requests on four ranks are less than one on a single rank."""
    fleet = Fleet(
        prefills=[make_facts(Role.PREFILL, ranks=4), make_facts(Role.PREFILL, ranks=1)],
        decodes=[make_facts(Role.DECODE)],
    )
    wide, narrow = hosts = fleet.eligible(Role.PREFILL)
    for rank in range(3):
        wide.reserve(rank, 100, fleet.clock())
    narrow.reserve(0, 100, fleet.clock())

    assert pick(make_policy(HostPolicy.LEAST_REQUESTS), [host.candidate for host in hosts]) == (0, 3)


@pytest.mark.parametrize("host", list(HostPolicy))
def test_rank_with_the_prompt_cached_is_picked_by_every_host_policy(host: HostPolicy) -> None:
    """There are 100 tokens left to compute behind 500, against 1000 on the idle rank."""
    (candidate,) = make_candidates(Role.PREFILL, [[500, 0]])
    policy = make_policy(host)
    _, rank = policy.pick([candidate], 1000, 1000.0, cached=CachedTokens({candidate.ranks[0]: 900.0}, 0.0))

    assert rank is candidate.ranks[0]


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_lone_endpoint_is_picked_by_every_policy(candidates: list[Candidate], policy: HostPolicy) -> None:
    """With one endpoint there is nothing to compare."""
    assert pick(make_policy(policy), candidates[:1]) == (0, 1)


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_no_rank_policy_leaves_the_rank_to_the_engine(candidates: list[Candidate], policy: HostPolicy) -> None:
    """One word of the configuration compares the policies with the pick of the engine itself."""
    assert pick(make_policy(policy, RankPolicy.NONE), candidates)[1] is None


@pytest.mark.parametrize("host", [HostPolicy.LOCKSTEP, HostPolicy.LEAST_TOKENS])
def test_ties_are_broken_at_random(host: HostPolicy) -> None:
    """Every rank of an idle fleet gets its share, so that replicas do not pile up on the first."""
    candidates = make_candidates(Role.PREFILL, [[0] * 4] * 2)
    policy = make_policy(host, seed=5)
    counts = Counter(pick(policy, candidates) for _ in range(1600))

    assert len(counts) == 8
    assert all(140 < count < 260 for count in counts.values())


def test_ties_of_least_tokens_are_between_ranks_not_endpoints() -> None:
    """An endpoint with one idle rank gets one share, beside one with three."""
    candidates = make_candidates(Role.PREFILL, [[0, 9, 9, 9], [0, 0, 0, 9]])
    policy = make_policy(HostPolicy.LEAST_TOKENS, seed=5)
    first = sum(pick(policy, candidates)[0] == 0 for _ in range(2000))

    assert 400 < first < 600


class TestTokenRoundRobin:
    """Token round robin picks the rank with the fewest tokens of all requests so far."""

    def test_token_round_robin_counts_ended_requests(self) -> None:
        """Three requests, each over before the next: 500 tokens on one rank outweigh two of 100 on the other."""
        (candidate,) = make_candidates(Role.PREFILL, [[0, 0]])
        policy = make_policy(HostPolicy.ROUND_ROBIN, RankPolicy.TOKEN_ROUND_ROBIN)
        _, first = policy.pick([candidate], 500, 1000.0)
        ranks = []
        assert first is not None
        first.reserve(500, 1000.0).complete(1001.0)
        for _ in range(5):
            _, rank = policy.pick([candidate], 100, 1002.0)
            assert rank is not None
            rank.reserve(100, 1002.0).complete(1003.0)
            ranks.append(rank.index)

        assert ranks == [1 - first.index] * 5

    def test_token_round_robin_ignores_the_load(self) -> None:
        """The policy works without any feedback, and so without external load."""
        (candidate,) = make_candidates(Role.PREFILL, [[90_000, 0]])
        candidate.ranks[1].reserve(10, 1000.0)

        assert pick(make_policy(HostPolicy.RANDOM, RankPolicy.TOKEN_ROUND_ROBIN), [candidate]) == (0, 0)


class TestScraped:
    """``signal: scraped`` is the gauge of used tokens, plus the prompt tokens of requests since then."""

    def test_scraped_increments_count_until_the_next_sample(self) -> None:
        """Of three picks of 300 against a gauge of 500, two go to the idle rank; then a sample replaces them."""
        fleet = Fleet(prefills=[make_facts(Role.PREFILL, ranks=2)], decodes=[make_facts(Role.DECODE)])
        host = fleet.endpoint(Role.PREFILL)
        fleet.sample(host.configured, [0, 500])
        policy = make_policy(HostPolicy.ROUND_ROBIN, signal=LoadSignal.SCRAPED)

        def place() -> int:
            _, rank = policy.pick([host.candidate], 300, fleet.clock())
            assert rank is not None
            rank.reserve(300, fleet.clock())
            return rank.index

        before = [place() for _ in range(3)]
        fleet.sample(host.configured, [0, 500])  # the queue is in no gauge of used tokens

        assert before == [0, 0, 1]
        assert place() == 0

    def test_scraped_increments_stay_after_a_response(self) -> None:
        """Only a sample removes an increment: a rank that is idle again still counts as loaded."""
        (candidate,) = make_candidates(Role.PREFILL, [[0, 100]])
        candidate.ranks[0].reserve(300, 1000.0).complete(1000.5)

        assert pick(make_policy(HostPolicy.RANDOM, signal=LoadSignal.SCRAPED), [candidate]) == (0, 1)

    @pytest.mark.parametrize("host", [HostPolicy.LEAST_TOKENS, HostPolicy.POWER_OF_TWO])
    def test_scraped_signal_also_compares_endpoints(self, host: HostPolicy) -> None:
        """Requests to the second endpoint that have ended still count there: 400 and 300 are more than 500."""
        candidates = make_candidates(Role.PREFILL, [[500], [400]])
        candidates[1].ranks[0].reserve(300, 1000.0).complete(1000.0)

        assert pick(make_policy(host, signal=LoadSignal.SCRAPED), candidates) == (0, 0)
        assert pick(make_policy(host), candidates) == (1, 0)


class TestLockstepPrefill:
    """All ranks of a prefill engine step together, and a step is as long as its fullest rank."""

    def test_running_step_hardly_counts_against_a_rank(self) -> None:
        """Rank 0 runs 2000 tokens, on rank 1 wait 800: those delay a new request, the running ones delay all alike."""
        (candidate,) = make_candidates(Role.PREFILL, [[0, 0]])
        running, waiting = candidate.ranks
        running.reserve(2000, 1000.0)  # the server was idle: it starts at once
        waiting.reserve(800, 1000.0)

        assert [rank.tokens for rank in candidate.ranks] == [500, 800]
        assert pick(make_policy(HostPolicy.LOCKSTEP), [candidate]) == (0, 0)

    def test_request_that_fits_under_the_fullest_rank_is_free_there(self) -> None:
        """Of 1000 waiting on one rank and none on the other, 900 more cost nobody anything; on an even server they do.

        Host 1 has its longest queue at 1000 before and after. On host 2 it would grow from 800 to 1500.
        """
        candidates = make_candidates(Role.PREFILL, [[1000, 0], [800, 600]])

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates, tokens=900) == (0, 1)
        assert pick(
            make_policy(HostPolicy.LEAST_TOKENS), make_candidates(Role.PREFILL, [[1000, 700], [800, 600]]), 900
        ) == (1, 1)

    def test_waiting_requests_of_an_engine_count(self) -> None:
        """Both engines would grow by 500; on the one where two requests wait already it delays them, too."""
        candidates = make_candidates(Role.PREFILL, [[0, 0], [0, 0]])
        for candidate in candidates:
            candidate.ranks[0].reserve(100, 1000.0)  # runs
        for rank in candidates[1].ranks:
            rank.reserve(50, 1000.0)
        candidates[0].ranks[0].reserve(100, 1000.0)

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates, tokens=500)[0] == 0

    def test_rank_with_cached_tokens_is_picked_while_it_is_cheaper(self) -> None:
        """Rank 0 has 900 of 1000 tokens cached: behind a queue of 500 it is done after 600, elsewhere after 1000."""
        (candidate,) = make_candidates(Role.PREFILL, [[500, 0]])
        policy = make_policy(HostPolicy.LOCKSTEP)
        held = CachedTokens({candidate.ranks[0]: 900.0}, 0.0)
        _, cheap = policy.pick([candidate], 1000, 1000.0, cached=held)
        _, dear = policy.pick(make_candidates(Role.PREFILL, [[5000, 0]]), 1000, 1000.0, cached=held)

        assert cheap is candidate.ranks[0]
        assert dear is not None
        assert dear.index == 1

    def test_rank_with_cached_tokens_is_not_picked_if_overloaded(self) -> None:
        """Affinity is a part of the cost, no rule above it: behind 5000 tokens a cached prompt is late all the same."""
        (candidate,) = make_candidates(Role.PREFILL, [[5000, 4950]])
        (other,) = make_candidates(Role.PREFILL, [[0, 0]])
        held = CachedTokens({candidate.ranks[0]: 900.0}, 0.0)
        _, rank = make_policy(HostPolicy.LOCKSTEP).pick([candidate, other], 1000, 1000.0, cached=held)

        assert rank in other.ranks

    def test_tokens_cached_on_all_ranks_decide_nothing(self) -> None:
        """With a system prompt that all ranks have cached, the least loaded rank gets the request."""
        (candidate,) = make_candidates(Role.PREFILL, [[300, 0]])
        _, rank = make_policy(HostPolicy.LOCKSTEP).pick([candidate], 1000, 1000.0, cached=CachedTokens({}, 900.0))

        assert rank is candidate.ranks[1]


class TestLockstepDecode:
    """Every sequence of a decode engine has the TPOT of the fullest rank."""

    def test_sequence_goes_under_the_fullest_rank(self) -> None:
        """Host 1 stays at 9000 whatever comes; host 2 grows by prompt and sequence from 5000 to 7000.

        That slows its two sequences down by 2000 each, which weighs 0.3: 8200 in all, less than 9000. From 8000 it
        would grow to 10000, which is more.
        """
        policy = make_policy(HostPolicy.LOCKSTEP)

        assert pick(policy, make_candidates(Role.DECODE, [[9000, 1000], [5000, 5000]]), 1000)[0] == 1
        assert pick(policy, make_candidates(Role.DECODE, [[9000, 1000], [8000, 8000]]), 1000) == (0, 1)

    def test_running_sequences_count(self) -> None:
        """Both would grow by 4000: with eight sequences that costs more than with two on slightly fuller ranks."""
        candidates = make_candidates(Role.DECODE, [[5000, 5000], [5200, 5200]])
        candidates[0].endpoint.groups[0].external_requests = 8

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates, 3000)[0] == 1

    def test_fixed_cost_of_a_sequence_counts(self) -> None:
        """A prompt of 10 tokens fits under 9000 beside 7000; on a rank with 8500 its sequence raises the maximum."""
        candidates = make_candidates(Role.DECODE, [[9000, 7000], [8900, 8500]])

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates, 10) == (0, 1)

    def test_engine_without_room_is_picked_last(self) -> None:
        """The first engine has no KV room for the prompt: it would wait, and keep a prefill rank waiting."""
        candidates = make_candidates(Role.DECODE, [[9000, 9000], [20_000, 20_000]])
        for candidate, capacity in zip(candidates, (10_000, 400_000), strict=True):
            for rank in candidate.ranks:
                rank.group._room[rank.position] = 0.85 * capacity  # type: ignore[attr-defined]

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates, 3000)[0] == 1

    def test_slow_engine_costs_more(self) -> None:
        """With the same tokens, a token costs twice as much on the engine that takes twice as long."""
        candidates = make_candidates(Role.DECODE, [[5000, 5000], [6000, 6000]])
        for group in candidates[0].endpoint.groups:
            group.slowness = 2.0

        assert pick(make_policy(HostPolicy.LOCKSTEP), candidates)[0] == 1


def test_replicas_break_ties_independently() -> None:
    """Replicas that compare the same idle fleet must not pick the same ranks."""
    candidates = make_candidates(Role.PREFILL, [[0] * 4] * 4)
    one, two = make_policy(HostPolicy.LOCKSTEP, seed=1), make_policy(HostPolicy.LOCKSTEP, seed=2)
    same = sum(pick(one, candidates) == pick(two, candidates) for _ in range(1000))

    assert same < 120  # one in sixteen by chance


def test_large_fleet_compares_some_endpoints_and_uses_all() -> None:
    """A decision costs the same with a hundred endpoints; those with the prompt cached are among the compared ones."""
    candidates = make_candidates(Role.PREFILL, [[0, 0]] * 100)
    policy = make_policy(HostPolicy.LOCKSTEP)
    hosts = [candidate.endpoint for candidate in candidates]
    near = [policy.within_reach(hosts, CachedTokens({}, 0.0)) for _ in range(400)]
    holder = hosts[70].ranks[1]

    assert {len(each) for each in near} == {REACH}
    assert {host.url for each in near for host in each} == {host.url for host in hosts}
    assert all(hosts[70] in policy.within_reach(hosts, CachedTokens({holder: 10.0}, 0.0)) for _ in range(100))
