"""The budget of retries, and the headers that name failed endpoints."""

import pytest

from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.config.reliability import RetrySettings
from dp_extproc.contract import is_loss, read_cut, read_failed, read_lost, write_failed, write_lost


def test_budget_bounds_the_attempts_of_a_request() -> None:
    """Three attempts are two retries."""
    budget = RetryBudget(RetrySettings(attempts=3))
    assert [budget.spend(attempts) for attempts in (1, 2, 3)] == [True, True, False]


def test_budget_bounds_a_storm_of_failures() -> None:
    """When everything fails, only the burst is retried, and then a part of what comes."""
    budget = RetryBudget(RetrySettings(attempts=10, budget=0.5, burst=3))
    assert [budget.spend(1) for _ in range(5)] == [True, True, True, False, False]
    for _ in range(4):
        budget.earn()
    assert [budget.spend(1) for _ in range(3)] == [True, True, False]


def test_the_budget_does_not_grow_beyond_the_burst() -> None:
    """A quiet night does not allow a storm in the morning."""
    budget = RetryBudget(RetrySettings(attempts=10, budget=1, burst=2))
    for _ in range(100):
        budget.earn()
    assert [budget.spend(1) for _ in range(3)] == [True, True, False]


def test_budget_of_one_attempt_has_no_retry() -> None:
    """One attempt in all."""
    assert not RetryBudget(RetrySettings(attempts=1)).spend(1)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, ()),
        ("", ()),
        ("10.0.0.1:1,10.0.0.2:2", ({"10.0.0.1:1", "10.0.0.2:2"},)),
        ("a:1,b:2;a:1,c:3", ({"a:1", "b:2"}, {"a:1", "c:3"})),
    ],
)
def test_failed_endpoints_are_read_from_the_header(header: str | None, expected: tuple[set[str], ...]) -> None:
    """Attempts by semicolons, their hosts by commas."""
    assert read_failed(header) == expected


@pytest.mark.parametrize(
    ("header", "lost"),
    [
        (None, None),
        ("a:1,b:2", None),
        ("a:1,b:2,cut", "b:2"),
        ("-,b:2,cut", "b:2"),
        ("a:1,b:2;c:3,d:4,cut", "d:4"),
        ("a:1,b:2,cut;c:3,d:4", None),
        ("a:1,b:2,cut!UC", "b:2"),
        (",,,", None),
    ],
)
def test_lost_endpoint_is_read_from_the_last_attempt(header: str | None, lost: str | None) -> None:
    """Earlier ones were counted when the last one was placed, and the mark is no host."""
    assert read_cut(header) == lost
    assert not any("cut" in hosts for hosts in read_failed(header))


def test_failed_endpoints_are_read_as_they_were_written() -> None:
    """Also when Envoy has joined several."""
    one, two = write_failed("a:1", "b:2"), write_failed("c:3")
    assert [*map(sorted, read_failed(f"{one.decode()};{two.decode()}"))] == [["a:1", "b:2"], ["c:3"]]


def test_header_of_failed_endpoints_is_read_up_to_a_bound() -> None:
    """Only Envoy sends it, but it is bounded all the same."""
    assert len(read_failed(";".join(["a:1"] * 10_000))) == 16


@pytest.mark.parametrize(
    ("header", "lost"),
    [
        ("a:1,b:2,cut!UC", ("b:2",)),
        ("-,b:2,cut!UC", ("b:2",)),
        ("a:1,b:2,cut!URX,UC", ("b:2",)),
        ("a:1,b:2,cut!UF", ()),
        ("a:1,b:2,cut!-", ()),
        ("a:1,b:2,cut", ()),
        (",,,", ()),
        (f"a:1,b:2,{write_lost('a:1')}", ("a:1",)),
        ("-,b:2,cut!UC;-,c:3,cut!UF;-,d:4,cut!UC", ("b:2", "d:4")),
    ],
)
def test_loss_is_read_if_the_engine_had_accepted_the_request(header: str, lost: tuple[str, ...]) -> None:
    """A refused connection is none: the engine has not seen the request."""
    assert read_lost(header) == lost


def test_loss_is_read_from_the_response_of_envoy() -> None:
    """Its value is that of one attempt, with the flags of the response."""
    assert is_loss("-,b:2,cut!UC")
    assert not is_loss("-,b:2,cut!UF")
    assert not is_loss("a:1,b:2")
