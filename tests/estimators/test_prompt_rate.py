"""The prompt tokens per second of an aggregated engine are learned while prompts wait."""

import pytest

from dp_extproc.estimators.prompt_rate import PromptRate

PAGES = {
    "prompts wait at both pages": ([(1000, True), (5000, True)], 4000.0),
    "no prompt waits at the first page": ([(1000, False), (5000, True)], None),
    "no prompt waits at the second page": ([(1000, True), (5000, False)], None),
    "the engine was restarted": ([(5000, True), (100, True)], None),
    "nothing was computed": ([(5000, True), (5000, True)], None),
    "the page has no count": ([(None, True), (5000, True)], None),
    "a later page has no count": ([(1000, True), (None, True), (9000, True)], None),
    "a tenth of each further measurement": ([(0, True), (4000, True), (12_000, True)], 4400.0),
}


@pytest.mark.parametrize(("pages", "expected"), PAGES.values(), ids=PAGES)
def test_rate_is_learned_between_pages_with_waiting_prompts(
    pages: list[tuple[int | None, bool]], expected: float | None
) -> None:
    """An engine without waiting prompts computes what arrives, which is not what it could."""
    rate = PromptRate()
    for second, (computed, waits) in enumerate(pages):
        rate.learn(computed, waits=waits, at=float(second))

    assert rate.per_second == (None if expected is None else pytest.approx(expected))


def test_rate_ignores_pages_that_follow_each_other_at_once() -> None:
    """The tokens of one step, divided by almost no time, are no rate."""
    rate = PromptRate()
    rate.learn(1000, waits=True, at=5.0)
    rate.learn(9000, waits=True, at=5.05)

    assert rate.per_second is None
