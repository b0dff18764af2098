"""Test which rank gets a request, release by release, without processes."""

import pytest

from dp_extproc.lab.engine.controller import Controller, EngineKilledError, conflict
from dp_extproc.lab.engine.leg import Leg, RefusedError
from dp_extproc.lab.engine.release import Release
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.work import Role, Stage, Work
from dp_extproc.lab.engine.settings import Settings

RANKS = [Rank(number, Limits(1000, 8, 0)) for number in range(4)]


def settings(role: Role, version: str = "0.5.23", method: str = "auto", *, dp_attention: bool = True) -> Settings:
    return Settings(
        role=role,
        dp_size=4,
        release=Release.parse(version),
        load_balance_method=method,
        dp_attention=dp_attention,
    )


def leg(room: int | None = 6, rank: int | None = None, explicit: int | None = None) -> Leg:
    return Leg("r", 10, 1, "h", 1, room, rank, explicit)


@pytest.mark.parametrize(
    ("role", "version", "method", "ranks"),
    [
        pytest.param(Role.PREFILL, "0.5.23", "auto", [2, 2], id="prefill follows rooms"),
        pytest.param(Role.DECODE, "0.5.23", "auto", [0, 1], id="decode goes round"),
        pytest.param(Role.DECODE, "0.5.8", "auto", [0, 1], id="since 0.5.8"),
        pytest.param(Role.DECODE, "0.5.7", "auto", [2, 2], id="before that by the room"),
        pytest.param(Role.DECODE, "0.5.23", "follow_bootstrap_room", [2, 2], id="decode with the option"),
        pytest.param(Role.PREFILL, "0.5.23", "round_robin", [0, 1], id="prefill with another option"),
        pytest.param(Role.PREFILL, "0.5.9", "round_robin", [2, 2], id="but not until 0.5.9"),
        pytest.param(Role.UNIFIED, "0.5.7", "auto", [0, 1], id="aggregated servers go round"),
    ],
)
def test_methods_pick_their_ranks(role: Role, version: str, method: str, ranks: list[int]) -> None:
    """Two requests have a room of rank 2."""
    controller = Controller(settings(role, version, method))

    assert [controller.choose(leg(), RANKS) for _ in range(2)] == ranks


def test_least_loaded_rank_is_picked() -> None:
    """Load is requests, or their tokens."""
    ranks = [Rank(number, Limits(1000, 8, 0)) for number in range(2)]
    ranks[0].add(Work("a", 0, 500, 1), Stage.WAITING)
    for name in ("b", "c"):
        ranks[1].add(Work(name, 1, 10, 1), Stage.WAITING)

    assert Controller(settings(Role.DECODE, method="total_requests")).choose(leg(), ranks) == 0
    assert Controller(settings(Role.DECODE, method="total_tokens")).choose(leg(), ranks) == 1


@pytest.mark.parametrize("rank", [-1, 4, 99])
def test_rank_out_of_range_by_release(rank: int) -> None:
    """From 0.5.10 on it is refused; before, Python's rules for list indices apply, and the engine ends beyond them."""
    with pytest.raises(RefusedError, match=rf"^routed_dp_rank={rank} out of range \[0, 4\)$"):
        Controller(settings(Role.DECODE)).check(leg(rank=rank))
    old = Controller(settings(Role.DECODE, "0.5.9"))
    old.check(leg(rank=rank))
    if rank == -1:
        assert old.choose(leg(rank=rank), RANKS) == 3
    else:
        with pytest.raises(EngineKilledError, match="IndexError"):
            old.choose(leg(rank=rank), RANKS)


def test_missing_room_ends_the_engine_that_follows_rooms() -> None:
    """It does not with an explicit rank, or with a single one."""
    controller = Controller(settings(Role.PREFILL))
    with pytest.raises(EngineKilledError, match="bootstrap_room is not None"):
        controller.choose(leg(room=None), RANKS)

    assert controller.choose(leg(room=None, rank=3), RANKS) == 3
    assert controller.choose(leg(room=None), RANKS[:1]) == 0


@pytest.mark.parametrize(
    ("version", "dp_attention", "rank", "explicit", "conflicts"),
    [
        pytest.param("0.5.23", True, 2, None, False, id="agrees"),
        pytest.param("0.5.23", True, 1, None, True, id="disagrees"),
        pytest.param("0.5.23", True, 1, 1, False, id="disagrees, but explicit"),
        pytest.param("0.5.15", True, 1, 1, True, id="explicit, before that mattered"),
        pytest.param("0.5.10", True, 1, None, False, id="before the check"),
        pytest.param("0.5.23", False, 2, None, True, id="plain DP is rank 0 everywhere"),
        pytest.param("0.5.23", False, 2, 2, False, id="plain DP, explicit"),
    ],
)
def test_conflict_is_found_by_release(
    version: str, dp_attention: bool, rank: int, explicit: int | None, conflicts: bool
) -> None:
    """A room of rank 2 is on several ranks."""
    text = conflict(leg(explicit=explicit), rank, settings(Role.PREFILL, version, dp_attention=dp_attention))

    assert (text is not None) == conflicts


@pytest.mark.parametrize("text", ["0.5", "next", ""])
def test_release_refuses_other_texts(text: str) -> None:
    """A version has three numbers."""
    with pytest.raises(ValueError, match="is not a version"):
        Release.parse(text)


def test_release_ignores_suffixes() -> None:
    """They change nothing."""
    assert str(Release.parse("v0.5.10.post1")) == "0.5.10"
    assert Release.parse("0.5.10rc1") == Release(0, 5, 10)
