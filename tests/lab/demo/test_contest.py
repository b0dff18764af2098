"""Test in which turns contenders get the requests."""

from collections import Counter

import pytest

from dp_extproc.lab.demo.contest import turns
from dp_extproc.lab.demo.jobs import make_jobs


@pytest.mark.parametrize("contenders", [1, 2, 3])
@pytest.mark.parametrize("requests", [1, 2, 5, 8])
def test_turns_give_every_request_to_every_router_once(contenders: int, requests: int) -> None:
    """This holds with few requests, too."""
    jobs = make_jobs(requests, seed=1)
    got: dict[int, Counter[int]] = {who: Counter() for who in range(contenders)}
    for who, some in turns(contenders, jobs):
        assert some
        got[who].update(map(id, some))

    assert list(got.values()) == [Counter(map(id, jobs))] * contenders


def test_turns_spread_a_drift_of_the_machine_evenly() -> None:
    """Own, ours, ours, own: both have the same average place in time."""
    order = [who for who, _ in turns(2, make_jobs(8, seed=1))]

    assert order == [0, 1, 1, 0]
    assert sum(place for place, who in enumerate(order) if who == 0) == sum(
        place for place, who in enumerate(order) if who == 1
    )
