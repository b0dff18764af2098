"""Test the estimate of how long a demo takes."""

import pytest

from dp_extproc.lab.demo.contest import turns
from dp_extproc.lab.demo.estimate import expected_seconds, in_words
from dp_extproc.lab.demo.jobs import make_jobs


def _seconds(requests: int, time_scale: float) -> float:
    parts = [part for _, part in turns(2, make_jobs(requests, seed=1))]
    return expected_seconds(parts, 80, time_scale, engines=2, ranks=4)


def test_estimate_is_near_a_measured_time() -> None:
    """400 requests in one turn took 15 s on two idle processors; start and warm-up are in the estimate."""
    starting = _seconds(2, 1e-9)
    (jobs,) = [part for _, part in turns(1, make_jobs(400, seed=1))]
    with_warm_up = expected_seconds([jobs], 80, 3.0, engines=2, ranks=4) - expected_seconds(
        [jobs], 80, 1e-9, engines=2, ranks=4
    )

    assert 14 < with_warm_up < 19
    assert 10 < starting < 30


def test_estimate_grows_with_requests_and_time_scale() -> None:
    """Engines that are twice as slow take twice the time, but for starting; so do twice as many requests."""
    starting = _seconds(800, 1e-9)

    assert _seconds(800, 6.0) - starting == pytest.approx(2 * (_seconds(800, 3.0) - starting), rel=1e-6)
    assert 1.5 < (_seconds(1600, 3.0) - starting) / (_seconds(800, 3.0) - starting) < 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "about a minute"), (70, "about a minute"), (85, "about 2 minutes"), (170, "about 3 minutes")],
)
def test_estimate_is_printed_in_minutes(seconds: float, words: str) -> None:
    """More precision is not needed."""
    assert in_words(seconds) == words
