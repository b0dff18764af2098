"""An engine's corrections are followed as far as they prove true."""

import itertools

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.sample_trust import SampleTrust
from dp_extproc.load.decode import DecodeGroup
from fleet_fixtures import absorb_sample

NOW = 1000.0


def test_the_first_correction_is_followed() -> None:
    """A service that starts beside a busy engine believes it at once, whatever it tells, and of every rank."""
    belief = SampleTrust(2)

    assert [belief.weigh(0, 30_000.0), belief.weigh(1, 500.0)] == [30_000.0, 500.0]


def test_what_each_correction_takes_back_is_followed_less_and_less() -> None:
    """Twenty thousand more, and twenty thousand less: after thirty of them little of it is believed, and never none."""
    belief = SampleTrust(1)
    followed = [belief.weigh(0, sign * 20_000.0) for sign in itertools.islice(itertools.cycle((1, -1)), 30)]

    assert [abs(each) for each in followed] == sorted(map(abs, followed), reverse=True)
    assert 0 < belief.share < 0.1


def test_what_is_told_again_and_again_prevails() -> None:
    """Whoever was not believed is, once what he tells stays the same: nine tenths are corrected after 15 samples."""
    belief = SampleTrust(1)
    for sign in itertools.islice(itertools.cycle((1, -1)), 30):
        belief.weigh(0, sign * 20_000.0)
    known = 0.0
    for _ in range(15):
        known += belief.weigh(0, 20_000.0 - known)

    assert 18_000 < known <= 20_000


def test_nothing_to_correct_tells_nothing() -> None:
    """An engine of which we know everything is believed as before."""
    belief = SampleTrust(1)
    for _ in range(100):
        belief.weigh(0, 0.0)

    assert belief.share == 1.0


def test_it_learns_by_samples_of_the_whole_server() -> None:
    """However many ranks these have."""
    shares = []
    for ranks in (1, 8):
        belief = SampleTrust(ranks)
        for sign in (1, -1, 1, -1, 1):
            for position in range(ranks):
                belief.weigh(position, sign * 1000.0)
        shares.append(belief.share)

    assert shares[0] == pytest.approx(shares[1], rel=0.3)
    assert shares[1] < 0.5


def test_a_decode_rank_does_not_swing_with_an_engine_that_tells_nonsense() -> None:
    """It tells 50,000 tokens of others in every second sample: in the end the rank seems to have some, all the time."""
    group = DecodeGroup(range(1), request_tokens=1000)
    loads = []
    for number in range(60):
        told = RankSample(0, 50_000, running_requests=5) if number % 2 else RankSample(0, 0)
        absorb_sample(group, told, NOW + number)
        loads.append(group.loads[0])

    assert max(loads[:4]) - min(loads[:4]) > 30_000
    assert max(loads[-4:]) - min(loads[-4:]) < 5_000


def test_an_empty_rank_is_empty() -> None:
    """However little the engine is believed: what it told by mistake must not keep requests away for long."""
    group = DecodeGroup(range(1), request_tokens=1000)
    for number in range(40):
        told = RankSample(0, 50_000, running_requests=5) if number % 2 else RankSample(0, 10, running_requests=1)
        absorb_sample(group, told, NOW + number)
    before = group.loads[0]
    absorb_sample(group, RankSample(0, 0), NOW + 60)

    assert before > 10_000
    assert group.loads[0] == 0
