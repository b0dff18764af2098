"""Endpoints with only one rank of an engine that has one port for each rank."""

import pytest

from dp_extproc.engines.agreement import as_single_rank, disagreement, page_of_single_rank
from dp_extproc.engines.model import Endpoint, LoadPage, Mode, RankSample, Role
from engines.test_capabilities import facts


def endpoint(rank: int | None, ranks: int | None = None) -> Endpoint:
    return Endpoint("http://h:1", "h", 1, "m", Role.PREFILL, dp_size=ranks, dp_rank=rank)


def page(*ranks: int) -> LoadPage:
    return LoadPage(tuple(RankSample(rank, used_tokens=10 * rank) for rank in ranks))


@pytest.mark.parametrize(("ranks", "position"), [(None, (2, 4)), (8, (2, 8))], ids=["discovered", "configured"])
def test_single_rank_has_its_position_in_the_whole_engine(ranks: int | None, position: tuple[int, int]) -> None:
    """It counts as one rank; rooms are drawn for its position."""
    found = as_single_rank(facts("0.5.23", Mode.PREFILL), endpoint(2, ranks))

    assert found.dp_ranks == 1
    assert found.position_of(0) == position
    assert disagreement(endpoint(2, ranks), found, page(0)) is None


def test_facts_stay_without_a_configured_rank() -> None:
    """The endpoint has all ranks of the engine."""
    whole = facts("0.5.23", Mode.PREFILL)

    assert as_single_rank(whole, endpoint(None)) is whole
    assert whole.position_of(3) == (3, 4)
    assert page_of_single_rank(page(0, 1), whole) == page(0, 1)


@pytest.mark.parametrize(
    ("on_page", "used"),
    [((2,), [20]), ((0,), [0]), ((0, 1, 2, 3), [20]), ((0, 1), [])],
    ids=["own rank", "counted from 0", "whole engine", "others only"],
)
def test_single_rank_takes_its_own_sample(on_page: tuple[int, ...], used: list[int]) -> None:
    """The page may have that rank alone, or all ranks."""
    found = as_single_rank(facts("0.5.23", Mode.PREFILL), endpoint(2))

    kept = page_of_single_rank(page(*on_page), found)
    assert [(sample.dp_rank, sample.used_tokens) for sample in kept.ranks] == [(0, each) for each in used]


def test_single_rank_out_of_range_is_a_disagreement() -> None:
    """Requests with its rooms would wait without end."""
    wrong = endpoint(4)

    failure = disagreement(wrong, as_single_rank(facts("0.5.23", Mode.PREFILL), wrong))
    assert failure is not None
    assert "has 4 DP rank(s), but this is to be the listener of rank 4" in failure.message


def test_single_rank_that_is_not_configured_is_a_disagreement() -> None:
    """Its load page has one rank of many, and the message has the remedy."""
    failure = disagreement(endpoint(None), facts("0.5.23", Mode.PREFILL), page(3))

    assert failure is not None
    assert failure.message.endswith("list every one of them, this one with dp_rank: 3")
