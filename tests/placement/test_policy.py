"""Each policy picks what its name says, and nothing else."""

from collections import Counter
from random import Random

import pytest

from dp_extproc.config import HostPolicy, RankPolicy
from dp_extproc.fleet.endpoint import Role
from dp_extproc.placement.load import Candidate
from dp_extproc.placement.policy import Turn, pick
from placement.fleet_fixtures import Fleet, make_facts

LOADS = ([500, 400, 900, 600], [800, 300, 700, 850], [450, 460, 470, 480])


@pytest.fixture
def candidates() -> list[Candidate]:
    """Three hosts of four ranks, loaded as in LOADS."""
    facts = make_facts(Role.PREFILL)
    fleet = Fleet(prefills=[facts] * 3, decodes=[make_facts(Role.DECODE)])
    hosts = [fleet.host(Role.PREFILL, number) for number in (1, 2, 3)]
    for host, tokens in zip(hosts, LOADS, strict=True):
        fleet.sample(host.endpoint, tokens)
    return [host.candidate for host in hosts]


def test_least_tokens_takes_the_least_loaded_rank_of_all_hosts(candidates: list[Candidate]) -> None:
    """The flat minimum: host 2 has the least loaded rank, although it is the most loaded host."""
    chosen, rank = pick(candidates, HostPolicy.LEAST_TOKENS, RankPolicy.MINIMUM_TOKENS, Random(1), Turn())

    assert (candidates.index(chosen), rank) == (1, 1)


def test_round_robin_takes_the_hosts_in_turn(candidates: list[Candidate]) -> None:
    """Hosts come round whatever their load; on each the least loaded rank is taken."""
    turn = Turn()
    picks = [pick(candidates, HostPolicy.ROUND_ROBIN, RankPolicy.MINIMUM_TOKENS, Random(1), turn) for _ in range(6)]

    assert [(candidates.index(chosen), rank) for chosen, rank in picks] == [(0, 1), (1, 1), (2, 0)] * 2


def test_a_round_robin_goes_on_when_a_host_leaves(candidates: list[Candidate]) -> None:
    """A turn beyond the hosts that are left starts over."""
    turn = Turn()
    for _ in range(3):
        pick(candidates, HostPolicy.ROUND_ROBIN, RankPolicy.NONE, Random(1), turn)
    chosen, _ = pick(candidates[:2], HostPolicy.ROUND_ROBIN, RankPolicy.NONE, Random(1), turn)

    assert chosen in candidates[:2]


def test_random_spreads_over_all_hosts(candidates: list[Candidate]) -> None:
    """Every host gets about a third."""
    rng = Random(3)
    counts = Counter(
        candidates.index(pick(candidates, HostPolicy.RANDOM, RankPolicy.NONE, rng, Turn())[0]) for _ in range(3000)
    )

    assert all(900 < counts[index] < 1100 for index in range(3))


def test_power_of_two_never_takes_the_most_loaded_host(candidates: list[Candidate]) -> None:
    """Of two hosts drawn the less loaded wins, so the most loaded one of three never does, and both others do."""
    rng = Random(3)
    picks = {
        candidates.index(pick(candidates, HostPolicy.POWER_OF_TWO, RankPolicy.NONE, rng, Turn())[0]) for _ in range(200)
    }

    assert picks == {0, 2}


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_a_lone_host_is_taken_by_every_policy(candidates: list[Candidate], policy: HostPolicy) -> None:
    """With one host there is nothing to choose."""
    chosen, rank = pick(candidates[:1], policy, RankPolicy.MINIMUM_TOKENS, Random(1), Turn())

    assert (chosen, rank) == (candidates[0], 1)


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_no_rank_policy_leaves_the_rank_to_the_engine(candidates: list[Candidate], policy: HostPolicy) -> None:
    """The comparison with the engine's own placement is one word in the configuration."""
    assert pick(candidates, policy, RankPolicy.NONE, Random(1), Turn())[1] is None


def test_ties_are_broken_at_random() -> None:
    """On an idle fleet every rank of every host gets its share, so that replicas do not pile up on the first."""
    facts = make_facts(Role.PREFILL)
    fleet = Fleet(prefills=[facts] * 2, decodes=[make_facts(Role.DECODE)])
    candidates = [fleet.host(Role.PREFILL, number).candidate for number in (1, 2)]
    rng = Random(5)
    counts: Counter[tuple[int, int | None]] = Counter()
    for _ in range(1600):
        chosen, rank = pick(candidates, HostPolicy.LEAST_TOKENS, RankPolicy.MINIMUM_TOKENS, rng, Turn())
        counts[candidates.index(chosen), rank] += 1

    assert len(counts) == 8
    assert all(140 < count < 260 for count in counts.values())


def test_ties_are_between_ranks_not_between_hosts() -> None:
    """A host with one idle rank gets one share, beside one with three."""
    facts = make_facts(Role.PREFILL)
    fleet = Fleet(prefills=[facts] * 2, decodes=[make_facts(Role.DECODE)])
    for number, tokens in ((1, [0, 9, 9, 9]), (2, [0, 0, 0, 9])):
        fleet.sample(fleet.host(Role.PREFILL, number).endpoint, tokens)
    candidates = [fleet.host(Role.PREFILL, number).candidate for number in (1, 2)]
    rng = Random(5)
    first = sum(
        pick(candidates, HostPolicy.LEAST_TOKENS, RankPolicy.MINIMUM_TOKENS, rng, Turn())[0] is candidates[0]
        for _ in range(2000)
    )

    assert 400 < first < 600
