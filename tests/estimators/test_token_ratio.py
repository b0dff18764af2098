"""Token estimates start within the usual range, and follow what the engines count."""

from random import Random

import pytest

from dp_extproc.estimators.token_ratio import LEAST, MOST, START, TokenRatio
from dp_extproc.request.prompt import Prompt

ENGINE = "http://10.0.0.1:31001"


def test_token_ids_are_exact() -> None:
    """Known tokens need no estimate."""
    assert TokenRatio().estimate(Prompt(0, 1234, None)) == 1234


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        pytest.param("The quick brown fox jumps over the lazy dog. " * 100, 700, 1300, id="english"),
        pytest.param("敏捷的棕色狐狸跳过了懒狗" * 167, 1000, 2100, id="2000 chinese characters"),
        pytest.param("素早い茶色の狐がのろまな犬を飛び越える" * 105, 1000, 2100, id="2000 japanese characters"),
        pytest.param("for (int i = 0; i < n; ++i) { a[i] += b[i]; }\n" * 50, 500, 1200, id="code"),
        pytest.param("", 1, 1, id="empty"),
    ],
)
def test_first_estimates_are_within_a_factor_of_two(text: str, least: int, most: int) -> None:
    """Without any count an estimate is that near to what usual tokenizers make of a text."""
    assert least <= TokenRatio().estimate(Prompt(len(text.encode()), 0, None)) <= most


def _feed(ratio: TokenRatio, text_bytes: int, counted: int, known: int = 0, rounds: int = 200) -> None:
    total = 0
    ratio.counted(ENGINE, total, 0.0)
    for second in range(1, rounds + 1):
        ratio.computed(ENGINE, text_bytes, known)
        total += counted
        ratio.counted(ENGINE, total, second)


@pytest.mark.parametrize("bytes_per_token", [1.5, 3.0, 6.0])
def test_the_ratio_follows_the_engines_count(bytes_per_token: float) -> None:
    """Whatever the tokenizer makes of the traffic, estimates come to agree with the engine."""
    ratio = TokenRatio()
    _feed(ratio, 60_000, round(60_000 / bytes_per_token))

    assert ratio.bytes_per_token == pytest.approx(bytes_per_token, rel=0.02)


def test_token_ids_do_not_change_the_ratio() -> None:
    """Engines count them among the prompts, so they are subtracted."""
    ratio = TokenRatio()
    _feed(ratio, 60_000, 20_000 + 50_000, known=50_000)

    assert ratio.bytes_per_token == pytest.approx(3.0, rel=0.02)


def test_external_traffic_alone_does_not_change_the_ratio() -> None:
    """What an engine counts without a reservation is of other senders."""
    ratio = TokenRatio()
    for count in range(0, 10_000_000, 100_000):
        ratio.counted(ENGINE, count, count / 100_000)

    assert ratio.bytes_per_token == START


def test_a_count_that_went_down_began_anew() -> None:
    """It is not taken for negative tokens."""
    ratio = TokenRatio()
    _feed(ratio, 60_000, 20_000)
    _feed(ratio, 60_000, 20_000)

    assert ratio.bytes_per_token == pytest.approx(3.0, rel=0.02)


def test_the_ratio_follows_a_change_of_traffic() -> None:
    """Old counts fade: after a few times the memory the new ratio holds."""
    ratio = TokenRatio()
    _feed(ratio, 1_000_000, 250_000, rounds=100)
    _feed(ratio, 1_000_000, 500_000, rounds=100)

    assert ratio.bytes_per_token == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(("counted", "bound"), [(10_000_000, LEAST), (0, MOST)], ids=["external traffic", "all cached"])
def test_the_ratio_stays_within_bounds(counted: int, bound: float) -> None:
    """No count makes an estimate absurd."""
    ratio = TokenRatio()
    _feed(ratio, 60_000, counted)

    assert ratio.bytes_per_token == bound


class TestExternalTraffic:
    """An engine counts the prompts of all senders, and texts have 4 bytes per token, whoever sends them."""

    def test_frequent_external_requests_stop_the_learning(self) -> None:
        """Three of four prompts are external, and each page of the engine has some of them."""
        ratio = TokenRatio()
        for second in range(500):
            ratio.computed(ENGINE, 20_000, 0)
            ratio.counted(ENGINE, 20_000 * second, second, external=True)

        assert ratio.bytes_per_token == START

    def test_rare_external_requests_stop_the_learning(self) -> None:
        """Every other prompt is external, on two pages of five; one more page without them is no evidence yet."""
        ratio, chance = TokenRatio(), Random(1)
        for second in range(3000):
            ratio.computed(ENGINE, 20_000, 0)
            ratio.counted(ENGINE, 10_000 * second, second, external=chance.random() < 0.4)

        assert ratio.bytes_per_token == pytest.approx(START, rel=0.05)

    def test_doubtful_pages_neither_stop_the_learning_nor_are_evidence(self) -> None:
        """A third of the pages may have external requests or not; with the others a ratio of 2 is learned."""
        ratio = TokenRatio()
        for second in range(200):
            ratio.computed(ENGINE, 20_000, 0)
            ratio.counted(ENGINE, 10_000 * second, second, external=None if second % 3 == 0 else False)

        assert ratio.bytes_per_token == pytest.approx(2, rel=0.1)

    def test_counts_around_external_requests_are_dropped(self) -> None:
        """Those of the first pages after them, too; once they have been gone for a while all is learned."""
        ratio = TokenRatio()
        count = 0

        def read(times: int, tokens: int, *, external: bool = False) -> None:
            nonlocal count
            for _ in range(times):
                ratio.computed(ENGINE, 100_000, 0)
                count += tokens
                ratio.counted(ENGINE, count, 0.0, external=external)

        read(10, 25_000)
        read(7, 100_000)
        read(1, 100_000, external=True)
        read(7, 100_000)
        before = ratio.bytes_per_token
        read(300, 50_000)

        assert before == START
        assert ratio.bytes_per_token == pytest.approx(2.0, rel=0.05)

    def test_pages_without_a_count_count_for_external_requests(self) -> None:
        """The count comes with every tenth page; external requests are on a page between."""
        ratio = TokenRatio()
        for page in range(1000):
            ratio.computed(ENGINE, 20_000, 0)
            ratio.counted(ENGINE, None if page % 10 else 10_000 * page, page, external=page % 10 == 5)

        assert ratio.bytes_per_token == START

    @pytest.mark.parametrize("share", [0.25, 0.7, 1.0])
    def test_the_rate_without_reservations_is_subtracted(self, share: float) -> None:
        """Requests come at random, and the engine is read once a second; some are counted a second late."""
        ratio, chance = TokenRatio(), Random(1)
        count = late = 0
        for second in range(5000):
            ours = [chance.expovariate(1 / 4000) for _ in range(6) if chance.random() < share / 6]
            external = [chance.expovariate(1 / 4000) for _ in range(6) if chance.random() < (1 - share) / 6]
            for size in ours:
                ratio.computed(ENGINE, round(size), 0)
            count += late
            late = round(sum(ours) / 2) if chance.random() < 0.2 else 0
            count += round(sum(ours) / 2) - late + round(sum(external) / 2)
            ratio.counted(ENGINE, count, second, idle=True)

        assert ratio.bytes_per_token == pytest.approx(2.0, rel=0.1)


def test_prompts_with_media_teach_nothing() -> None:
    """Their tokens are a rough estimate, and may be counted one page later; afterwards texts are learned from again."""
    ratio = TokenRatio()
    count = 0
    for page in range(40):
        ratio.computed("e", 40_000, 0)
        ratio.computed("e", 0, 1_000, doubtful=page % 2 == 0)
        count += 10_000 + 90_000
        ratio.counted("e", count, float(page))
    assert ratio.bytes_per_token == START
    for page in range(40, 80):
        ratio.computed("e", 20_000, 0)
        count += 10_000
        ratio.counted("e", count, float(page))
    assert ratio.bytes_per_token < START
