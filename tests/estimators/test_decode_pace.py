"""The reported time per output token, the steps behind it, and the durations of sequences."""

import pytest

from dp_extproc.engines.model import DecodeSteps, RankSample
from dp_extproc.estimators.decode_pace import ALIKE, DEFAULT_TPOT, DecodePace, compare

NOW = 1000.0


def counted(*counts: tuple[float, float, float, float], seconds: float = 1.0) -> DecodePace:
    """Make the pace of a rank that has reported one count of its steps after the other."""
    pace = DecodePace(1)
    for number, count in enumerate(counts):
        pace.learn(0, RankSample(0, 0, decoded=DecodeSteps(*count)), NOW + seconds * number)
    return pace


def stepped(steps: int, tpot: float, *, then_idle: float = 0.0) -> DecodePace:
    """Make the pace of a rank that has made so many steps of a sequence, and then none for so many seconds."""
    count = (steps, steps, steps * tpot, steps)
    pace = counted((0, 0, 0, 0), count)
    pace.learn(0, RankSample(0, 0, decoded=DecodeSteps(*count)), NOW + 1 + then_idle)
    return pace


def slowness(*paces: DecodePace) -> list[float]:
    found = compare(paces)
    assert found is not None
    return found[1]


def test_tpot_is_learned_from_the_steps_of_the_engine() -> None:
    """Fifty steps in two seconds are 40 ms per token, however long the engine has been idle before or between them."""
    assert counted((100, 700, 9.0, 700)).reported is None
    assert counted((100, 700, 9.0, 700), (150, 1700, 11.0, 1700)).reported == pytest.approx(0.04)


def test_speculative_decoding_shortens_tpot_below_the_step() -> None:
    """Twenty sequences that got 2.5 tokens each in a step of 40 ms wait 16 ms for one."""
    assert counted((0, 0, 0, 0), (50, 1000, 2.0, 2500)).reported == pytest.approx(0.016)


@pytest.mark.parametrize("later", [(100, 700, 9.0, 700), (3, 9, 0.1, 9), (150, 1700, 8.0, 1700)])
def test_no_step_and_a_restart_give_no_tpot(later: tuple[float, float, float, float]) -> None:
    """A clock that went backwards gives none, either."""
    assert counted((100, 700, 9.0, 700), later).reported is None


def test_many_steps_weigh_more_than_few() -> None:
    """Ninety steps of 20 ms and ten of 70 ms, in one moment, are 25 ms on average."""
    pace = counted((0, 0, 0, 0), (90, 90, 1.8, 90), (100, 100, 2.5, 100), seconds=0.0)

    assert pace.reported == pytest.approx(0.025)


def test_old_steps_weigh_less_than_new_ones() -> None:
    """After five seconds 100 steps of 20 ms weigh as 50 do, and 50 of 50 ms make it 35 ms."""
    pace = counted((0, 0, 0, 0), (100, 100, 2.0, 100), (150, 150, 4.5, 150), seconds=5.0)

    assert pace.reported == pytest.approx(0.035)


def test_tpot_follows_from_the_rate_of_an_engine_without_step_counts() -> None:
    """Twenty running sequences that make 1000 tokens per second wait 20 ms for each."""
    pace = DecodePace(1)
    for _ in range(2):
        pace.learn(0, RankSample(0, 0, running_requests=20, tokens_per_second=1000.0), NOW)

    assert pace.reported == pytest.approx(0.02)


def test_a_rate_that_began_without_sequences_gives_no_tpot() -> None:
    """The engine divides by the time since its last report, pauses included."""
    pace = DecodePace(1)
    for running in (0, 20, 0, 20):
        pace.learn(0, RankSample(0, 0, running_requests=running, tokens_per_second=100.0), NOW)

    assert pace.reported is None


def test_an_idle_engine_gives_no_tpot() -> None:
    """Without sequences or without throughput there is nothing to divide."""
    pace = DecodePace(2)
    for _ in range(2):
        pace.learn(0, RankSample(0, 0, running_requests=0, tokens_per_second=1000.0), NOW)
        pace.learn(1, RankSample(1, 0, running_requests=5, tokens_per_second=0.0), NOW)

    assert pace.reported is None


def test_comparison_needs_a_reported_tpot() -> None:
    """Without any there is nothing to compare."""
    assert compare([DecodePace(1), DecodePace(2)]) is None


def test_a_much_slower_engine_counts_as_slower() -> None:
    """Of 20 and 60 ms the average is 40, and they are half and one and a half times that, less what counts as alike."""
    assert slowness(stepped(10**6, 0.02), stepped(10**6, 0.06)) == pytest.approx([0.5 * ALIKE, 1.5 / ALIKE], rel=0.01)


def test_a_few_slow_steps_change_the_slowness_little() -> None:
    """Otherwise three slow steps would keep requests away, and the engine could make no faster ones."""
    assert slowness(stepped(1000, 0.02), stepped(3, 0.06)) == [1.0, 1.0]


def test_slowness_fades_while_an_engine_is_idle() -> None:
    """An engine that was slow half a minute ago is as good as any."""
    assert slowness(stepped(200, 0.02), stepped(200, 0.06))[1] > 1.2
    assert slowness(stepped(200, 0.02), stepped(200, 0.06, then_idle=30.0))[1] == 1.0


def test_slowness_is_gone_after_an_idle_day() -> None:
    """No step is left, so that all engines are alike."""
    paces = [stepped(1000, tpot, then_idle=86400.0) for tpot in (0.02, 0.06)]

    assert slowness(*paces) == [1.0, 1.0]
    assert [pace.reported for pace in paces] == pytest.approx([0.02, 0.06])


def test_engines_without_a_report_count_as_fast_as_the_reported_one() -> None:
    """Their time per output token is assumed to be that one."""
    found = compare([stepped(1000, 0.02), DecodePace(1)])

    assert found is not None
    assert found[0] == pytest.approx((0.02 + DEFAULT_TPOT) / 2)
    assert found[1] == [1.0, 1.0]
