"""How long a demo is said to take."""

import pytest

from dp_extproc.lab.demo.contest import turns
from dp_extproc.lab.demo.estimate import expected_seconds, in_words
from dp_extproc.lab.demo.jobs import make_jobs


def _seconds(requests: int, time_scale: float) -> float:
    parts = [part for _, part in turns(2, make_jobs(requests, seed=1))]
    return expected_seconds(parts, 80, time_scale, engines=2, ranks=4)


def test_the_estimate_is_near_to_what_was_measured() -> None:
    """400 requests in one turn took 15 s on two idle processors; start and warm-up come to that."""
    starting = _seconds(2, 1e-9)
    (jobs,) = [part for _, part in turns(1, make_jobs(400, seed=1))]
    with_warm_up = expected_seconds([jobs], 80, 3.0, engines=2, ranks=4) - expected_seconds(
        [jobs], 80, 1e-9, engines=2, ranks=4
    )

    assert 14 < with_warm_up < 19
    assert 10 < starting < 30


def test_the_estimate_follows_requests_and_time_scale() -> None:
    """Twice as slow engines take twice the time, but for starting; so do twice as many requests, but for their ends."""
    starting = _seconds(800, 1e-9)

    assert _seconds(800, 6.0) - starting == pytest.approx(2 * (_seconds(800, 3.0) - starting), rel=1e-6)
    assert 1.5 < (_seconds(1600, 3.0) - starting) / (_seconds(800, 3.0) - starting) < 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "about a minute"), (70, "about a minute"), (85, "about 2 minutes"), (170, "about 3 minutes")],
)
def test_the_estimate_is_told_in_minutes(seconds: float, words: str) -> None:
    """Nobody wants to know it better."""
    assert in_words(seconds) == words
