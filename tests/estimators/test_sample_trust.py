"""An engine's corrections are applied as far as earlier ones have held."""

import itertools

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.sample_trust import SampleTrust
from dp_extproc.load.decode import DecodeGroup
from fleet_fixtures import absorb_sample

NOW = 1000.0


def test_the_first_correction_is_applied_completely() -> None:
    """A service that starts beside a busy engine has no reservation for its load, whatever it is, and of every rank."""
    trust = SampleTrust(2)

    assert [trust.weigh(0, 30_000.0), trust.weigh(1, 500.0)] == [30_000.0, 500.0]


def test_alternating_corrections_lower_the_sample_trust() -> None:
    """Twenty thousand more, and twenty thousand less: after thirty of them little is applied, and never nothing."""
    trust = SampleTrust(1)
    followed = [trust.weigh(0, sign * 20_000.0) for sign in itertools.islice(itertools.cycle((1, -1)), 30)]

    assert [abs(each) for each in followed] == sorted(map(abs, followed), reverse=True)
    assert 0 < trust.share < 0.1


def test_a_repeated_sample_prevails_over_low_trust() -> None:
    """Nine tenths of what stays the same are corrected after 15 samples, after however much nonsense."""
    trust = SampleTrust(1)
    for sign in itertools.islice(itertools.cycle((1, -1)), 30):
        trust.weigh(0, sign * 20_000.0)
    known = 0.0
    for _ in range(15):
        known += trust.weigh(0, 20_000.0 - known)

    assert 18_000 < known <= 20_000


def test_a_correction_of_zero_leaves_the_trust() -> None:
    """An engine whose load is all explained is trusted as before."""
    trust = SampleTrust(1)
    for _ in range(100):
        trust.weigh(0, 0.0)

    assert trust.share == 1.0


def test_the_trust_changes_by_samples_of_the_whole_engine() -> None:
    """The number of its ranks makes no difference."""
    shares = []
    for ranks in (1, 8):
        trust = SampleTrust(ranks)
        for sign in (1, -1, 1, -1, 1):
            for position in range(ranks):
                trust.weigh(position, sign * 1000.0)
        shares.append(trust.share)

    assert shares[0] == pytest.approx(shares[1], rel=0.3)
    assert shares[1] < 0.5


def test_a_decode_rank_does_not_swing_with_an_engine_that_reports_nonsense() -> None:
    """It reports 50,000 external tokens in every second sample: in the end the rank has a few of them all the time."""
    group = DecodeGroup(range(1), request_tokens=1000)
    loads = []
    for number in range(60):
        sample = RankSample(0, 50_000, running_requests=5) if number % 2 else RankSample(0, 0)
        absorb_sample(group, sample, NOW + number)
        loads.append(group.loads[0])

    assert max(loads[:4]) - min(loads[:4]) > 30_000
    assert max(loads[-4:]) - min(loads[-4:]) < 5_000


def test_an_empty_sample_is_applied_completely() -> None:
    """Whatever the trust is: a load that was reported by mistake must not keep requests away for long."""
    group = DecodeGroup(range(1), request_tokens=1000)
    for number in range(40):
        sample = RankSample(0, 50_000, running_requests=5) if number % 2 else RankSample(0, 10, running_requests=1)
        absorb_sample(group, sample, NOW + number)
    before = group.loads[0]
    absorb_sample(group, RankSample(0, 0), NOW + 60)

    assert before > 10_000
    assert group.loads[0] == 0
