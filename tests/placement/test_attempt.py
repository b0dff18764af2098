"""An attempt gives back what it reserved exactly once, whatever happens in whatever order."""

from itertools import permutations

import pytest

from dp_extproc.fleet.endpoint import Role
from dp_extproc.placement.attempt import Attempt
from placement.fleet_fixtures import Fleet, make_facts

EVENTS = ("prefill", "first_byte", "end")


def _tell(attempt: Attempt, event: str, now: float) -> None:
    if event == "prefill":
        attempt.prefill_answered(200, now)
    elif event == "first_byte":
        attempt.first_byte(200, now)
    else:
        attempt.end(now)


@pytest.mark.parametrize(
    "events",
    [order for length in range(4) for order in permutations(EVENTS, length)],
    ids=lambda order: "-".join(order) or "none",
)
def test_the_books_are_empty_after_the_end(events: tuple[str, ...]) -> None:
    """Events may be missing or come in any order, and twice; once the end was told the books are exactly empty."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    prefill, decode = fleet.host(Role.PREFILL), fleet.host(Role.DECODE)
    answered: list[int] = []
    attempt = Attempt(
        1, 0, prefill.reserve(1, 70, 0), decode.reserve(2, 70, 0), leg="leg", on_prefill_answer=answered.append
    )
    for now, event in enumerate((*events, *events), start=1):
        _tell(attempt, event, now)

    over = "end" in events
    assert prefill.requests == (0 if over or "prefill" in events else 1)
    assert decode.requests == (0 if over else 1)
    assert prefill.tokens == 0 if prefill.requests == 0 else prefill.tokens > 0
    assert decode.tokens == 0 if over else decode.tokens >= 70
    heard = "prefill" in events and "end" not in events[: events.index("prefill")]
    assert answered == ([200] if heard else [])


def test_on_one_server_the_first_byte_tells_that_the_prompt_is_done() -> None:
    """An aggregated worker has no prefill leg; its response headers stand for the answer of one."""
    worker = Fleet(workers=[make_facts(Role.WORKER)]).host(Role.WORKER)
    answered: list[int] = []
    attempt = Attempt(1, 0, (), worker.reserve(0, 70, 0), on_prefill_answer=answered.append)
    queued = worker.tokens
    attempt.first_byte(200, 1)
    before = worker.tokens
    attempt.end(2)

    assert answered == [200]
    assert queued - before == 70  # to be computed no more, but still to be held
    assert (before >= 70, worker.tokens) == (True, 0)
