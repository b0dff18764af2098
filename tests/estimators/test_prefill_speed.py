"""The measured prefill speed follows an engine, and survives its restart."""

import pytest

from dp_extproc.engines.model import PrefillSteps
from dp_extproc.estimators.prefill_speed import PrefillSpeed, compare_speeds


def make_speed(per_token: float, seconds: float = 60.0, *, steps: int = 60) -> PrefillSpeed:
    speed = PrefillSpeed()
    for step in range(steps + 1):
        done = seconds * step / steps
        speed.learn(PrefillSteps(done / per_token, done))
    return speed


def test_speed_is_time_per_token_between_pages() -> None:
    assert make_speed(1e-4).seconds_per_token == pytest.approx(1e-4)


def test_speed_is_unknown_without_steps() -> None:
    speed = PrefillSpeed()
    speed.learn(PrefillSteps(0, 0.0))
    speed.learn(PrefillSteps(0, 0.0))

    assert speed.seconds_per_token is None


def test_speed_follows_a_change_within_minutes() -> None:
    speed = make_speed(1e-4, 600.0)
    tokens, seconds = 600.0 / 1e-4, 600.0
    for _ in range(120):
        tokens, seconds = tokens + 5000, seconds + 1
        speed.learn(PrefillSteps(tokens, seconds))

    assert speed.seconds_per_token == pytest.approx(2e-4, rel=0.15)


def test_counts_before_the_first_page_weigh_little() -> None:
    """The warm-up of the engine is among them."""
    speed = PrefillSpeed()
    speed.learn(PrefillSteps(1000, 100.0))
    speed.learn(PrefillSteps(1000 + 400_000, 140.0))

    assert speed.seconds_per_token == pytest.approx(1e-4, rel=0.15)


def test_restart_keeps_the_speed() -> None:
    speed = make_speed(1e-4)
    speed.learn(PrefillSteps(10, 0.5))

    assert speed.seconds_per_token == pytest.approx(1e-4)


def test_slowness_is_relative_to_the_pool() -> None:
    """A slow engine is slower than the average of all tokens, and those that differ by chance count as equal."""
    slow = compare_speeds([make_speed(1e-4), make_speed(1.05e-4), make_speed(2e-4)])

    assert slow[0] == slow[1] / 1.0 or slow[1] / slow[0] < 1.06
    assert slow[2] / slow[0] == pytest.approx(2.0, rel=0.2)


def test_engine_without_counts_is_an_average_one() -> None:
    assert compare_speeds([PrefillSpeed(), make_speed(1e-4)]) == [1.0, 1.0]
    assert compare_speeds([PrefillSpeed(), PrefillSpeed()]) == [1.0, 1.0]


def test_slowness_by_few_steps_counts_little() -> None:
    few = compare_speeds([make_speed(1e-4), make_speed(4e-4, seconds=0.1)])

    assert few == [1.0, 1.0]
