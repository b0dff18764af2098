"""The expected cached tokens are held against those that the engine counts."""

import pytest

from dp_extproc.estimators.prefix_truth import PrefixTruth


class Pages:
    """Prompts of 10,000 tokens, nine tenths of which are expected in cache, and pages five seconds apart."""

    def __init__(self) -> None:
        self.truth = PrefixTruth()
        self.now = 1000.0
        self._prompt = self._cached = 0
        self.truth.counted(0, 0, self.now)

    def read(self, prompts: int, found: float, *, external: int = 0, external_found: int = 0) -> bool:
        """Compute some prompts, of which the engine finds a share of the expected tokens, and read its page."""
        for _ in range(prompts):
            self.truth.computed(10_000, 9_000)
        self._prompt += 10_000 * prompts + external
        self._cached += round(9_000 * prompts * found) + external_found
        self.now += 5
        self.truth.counted(self._prompt, self._cached, self.now)
        self.now += 5
        return self.truth.counted(self._prompt, self._cached, self.now)

    @property
    def share(self) -> float:
        return self.truth.share(self.now)


def test_true_expectation_counts_fully() -> None:
    pages = Pages()
    for _ in range(10):
        assert not pages.read(5, 0.95)

    assert pages.share == 1.0
    assert pages.truth.expected == 450_000
    assert pages.truth.found == pytest.approx(0.95 * 450_000)


def test_expectation_of_an_engine_that_evicts_sooner_counts_in_part() -> None:
    pages = Pages()
    for _ in range(20):
        assert not pages.read(5, 0.4)

    assert pages.share == pytest.approx(0.4, abs=0.05)


def test_flush_is_noticed_and_forgiven() -> None:
    """A page without a cached token shows it; some minutes later the expectation counts again."""
    pages = Pages()
    pages.read(5, 1.0)

    assert pages.read(5, 0.0)
    assert pages.share < 1.0
    for _ in range(30):
        pages.read(2, 1.0)
    assert pages.share == 1.0


def test_engine_without_a_cache_has_the_least_share() -> None:
    pages = Pages()
    for _ in range(100):
        pages.read(20, 0.0)

    assert pages.share == pytest.approx(0.05, abs=0.01)


def test_few_misses_are_no_flush() -> None:
    assert not Pages().read(2, 0.0)


def test_prompts_of_other_routers_do_not_count_as_ours() -> None:
    """They take their part of the cached tokens; without a prompt of ours nothing is compared."""
    pages = Pages()
    for _ in range(10):
        pages.read(5, 1.0, external=50_000, external_found=45_000)
        pages.read(0, 1.0, external=50_000, external_found=45_000)

    assert pages.truth.found == pytest.approx(pages.truth.expected)


def test_restart_is_no_miss() -> None:
    pages = Pages()
    pages.read(5, 1.0)
    pages.truth.computed(10_000, 9_000)

    assert not pages.truth.counted(100, 0, pages.now + 10)
    assert not pages.truth.counted(100, 0, pages.now + 20)
    assert pages.truth.found == pages.truth.expected == 45_000


def test_responses_that_come_after_the_page_are_no_misses() -> None:
    """Under constant traffic half a minute is compared at a time."""
    truth, prompts = PrefixTruth(), 0
    truth.counted(0, 0, 1000.0)
    for page in range(1, 61):
        prompts += 10
        for _ in range(9 if page == 1 else 10):  # the last response of each page is not here yet
            truth.computed(10_000, 9_000)
        truth.counted(10_000 * prompts, 9_000 * prompts, 1000.0 + 10 * page)

    assert truth.found == pytest.approx(truth.expected, rel=0.05)
    assert truth.share(1600.0) == 1.0
