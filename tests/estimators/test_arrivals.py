"""The rate of arriving prompt tokens is a mean that fades, whatever the order in which arrivals become known."""

import math
from random import Random

import pytest

from dp_extproc.estimators.arrivals import ArrivalRate


def test_rate_is_zero_before_the_first_arrival() -> None:
    """A service without traffic reports no arrivals."""
    assert ArrivalRate().per_second(1000.0) == 0.0


def test_rate_averages_the_first_arrivals_over_ten_seconds() -> None:
    """One request after the start is no high rate, and a steady one is right after the ten seconds."""
    rate = ArrivalRate()
    rate.add(6000.0, 1000.0)

    assert rate.per_second(1000.0) == pytest.approx(6000 / (60 * (1 - math.exp(-10 / 60))))
    for second in range(1, 30):
        rate.add(6000.0, 1000.0 + second)
    assert rate.per_second(1029.0) == pytest.approx(6000, rel=0.05)


def test_rate_fades_to_a_third_in_a_minute() -> None:
    """What has arrived a minute ago counts for 1/e."""
    rate = ArrivalRate()
    for second in range(600):
        rate.add(100.0, float(second))
    before = rate.per_second(599.0)

    assert before == pytest.approx(100, rel=0.01)
    assert rate.per_second(659.0) == pytest.approx(before / math.e, rel=0.001)


def test_rate_does_not_depend_on_the_order_of_arrivals() -> None:
    """A snapshot of a peer names its requests in any order, and they are older than those of this replica."""
    arrivals = [(float(second), 100.0 * (1 + second % 7)) for second in range(100)]
    one, other = ArrivalRate(), ArrivalRate()
    for at, tokens in arrivals:
        one.add(tokens, at)
    Random(1).shuffle(arrivals)
    for at, tokens in arrivals:
        other.add(tokens, at)

    assert other.per_second(110.0) == pytest.approx(one.per_second(110.0))
