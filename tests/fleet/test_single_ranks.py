"""Ranks that have listeners of their own: each is seen as a server of one rank that knows its place."""

import pytest

from dp_extproc.engines.agreement import as_single_rank, disagreement, page_of_single_rank
from dp_extproc.engines.model import Endpoint, LoadPage, Mode, RankSample, Role
from engines.test_capabilities import facts


def endpoint(rank: int | None, ranks: int | None = None) -> Endpoint:
    return Endpoint("http://h:1", "h", 1, "m", Role.PREFILL, dp_size=ranks, dp_rank=rank)


def page(*ranks: int) -> LoadPage:
    return LoadPage(tuple(RankSample(rank, used_tokens=10 * rank) for rank in ranks))


@pytest.mark.parametrize(("ranks", "place"), [(None, (2, 4)), (8, (2, 8))], ids=["discovered", "configured"])
def test_its_place(ranks: int | None, place: tuple[int, int]) -> None:
    """It counts as one rank; rooms are drawn for its place among those of the whole server."""
    seen = as_single_rank(facts("0.5.23", Mode.PREFILL), endpoint(2, ranks))

    assert seen.dp_ranks == 1
    assert seen.position_of(0) == place
    assert disagreement(endpoint(2, ranks), seen, page(0)) is None


def test_others_stay_as_they_are() -> None:
    """Without ``dp_rank`` a server has all its ranks."""
    whole = facts("0.5.23", Mode.PREFILL)

    assert as_single_rank(whole, endpoint(None)) is whole
    assert whole.position_of(3) == (3, 4)
    assert page_of_single_rank(page(0, 1), whole) == page(0, 1)


@pytest.mark.parametrize(
    ("shown", "used"),
    [((2,), [20]), ((0,), [0]), ((0, 1, 2, 3), [20]), ((0, 1), [])],
    ids=["own rank", "counted from 0", "whole server", "others only"],
)
def test_its_load(shown: tuple[int, ...], used: list[int]) -> None:
    """Of a load page its own rank counts, whether the page shows all or only that one."""
    seen = as_single_rank(facts("0.5.23", Mode.PREFILL), endpoint(2))

    kept = page_of_single_rank(page(*shown), seen)
    assert [(sample.dp_rank, sample.used_tokens) for sample in kept.ranks] == [(0, each) for each in used]


def test_a_rank_that_is_not_there() -> None:
    """It is a disagreement; requests with its rooms would wait for nobody."""
    wrong = endpoint(4)

    failure = disagreement(wrong, as_single_rank(facts("0.5.23", Mode.PREFILL), wrong))
    assert failure is not None
    assert "has 4 DP rank(s), but this is to be the listener of rank 4" in failure.message


def test_a_listener_that_is_listed_as_a_server() -> None:
    """Its load page shows one rank of many, and the message says what to write."""
    failure = disagreement(endpoint(None), facts("0.5.23", Mode.PREFILL), page(3))

    assert failure is not None
    assert failure.message.endswith("list every one of them, this one with dp_rank: 3")
