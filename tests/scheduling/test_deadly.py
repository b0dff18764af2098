"""Test which requests count as deadly, and which do not: one situation each."""

import pytest

from dp_extproc.scheduling.deadly import (
    APART_SECONDS,
    KEPT_SECONDS,
    MOST_REQUESTS,
    DeadlyRequest,
    DeadlyRequests,
    Verdict,
)

CHECK = 5.0
A, B, C = "10.0.0.1:30000", "10.0.0.2:30000", "10.0.0.3:30000"
KILLER, OTHER = "killer", "other"


class World:
    """Requests that are lost, and engines that die and return."""

    def __init__(self) -> None:
        self.found: list[DeadlyRequest] = []
        self.published: list[tuple[str, str, float]] = []
        self.deadly = DeadlyRequests(self.found.append, lambda *loss: self.published.append(loss), check_seconds=CHECK)

    def dies(self, address: str, at: float, *fingerprints: str) -> None:
        """Lose some requests with an engine that refuses connections half a second later."""
        for fingerprint in fingerprints:
            self.deadly.lost(fingerprint, address, at)
        self.deadly.refused(address, at + 0.5)


@pytest.fixture
def world() -> World:
    """Make a memory without losses."""
    return World()


def test_request_is_deadly_when_two_engines_have_died_of_it(world: World) -> None:
    """It is reported once, and refused for as long as the losses are remembered."""
    world.dies(A, 0.0, KILLER)
    assert world.deadly.judge(KILLER, 0.5) is Verdict.FREE
    world.dies(B, 1.0, KILLER)

    refusal = world.deadly.refuse(KILLER, 2.0, 46)
    assert refusal is not None
    assert (refusal.status, refusal.reason.value) == (422, "deadly_request")
    assert world.deadly.judge(KILLER, KEPT_SECONDS - 1) is Verdict.DEADLY
    assert world.deadly.judge(KILLER, KEPT_SECONDS + 1) is Verdict.FREE
    assert world.deadly.judge(OTHER, 2.0) is Verdict.FREE
    assert world.found == [DeadlyRequest(KILLER, (A, B), 46)]


def test_request_is_refused_while_the_deaths_are_checked(world: World) -> None:
    """The client may try again shortly, and an engine that has not died by then has no share."""
    world.dies(A, 0.0, KILLER)
    world.deadly.lost(KILLER, B, 1.0)

    refusal = world.deadly.refuse(KILLER, 1.1, 0)
    assert refusal is not None
    assert (refusal.status, dict(refusal.headers)) == (503, {"retry-after": "1"})
    assert world.deadly.judge(KILLER, 1.0 + CHECK) is Verdict.FREE


def test_request_is_free_when_an_engine_goes_on(world: World) -> None:
    """A connection that was cut by the network, or kept open for too long, is no death."""
    world.dies(A, 0.0, KILLER)
    world.deadly.lost(KILLER, B, 1.0)
    world.deadly.alive(B, 0.9)  # read before the loss
    assert world.deadly.judge(KILLER, 1.1) is Verdict.CHECKING
    world.deadly.alive(B, 1.2)
    world.deadly.refused(B, 1.3)

    assert world.deadly.judge(KILLER, 1.4) is Verdict.FREE


def test_request_is_free_after_a_rolling_restart(world: World) -> None:
    """The second engine is ended when the first is back."""
    world.dies(A, 0.0, KILLER)
    world.deadly.alive(A, 30.0)
    world.dies(B, 31.0, KILLER)

    assert world.deadly.judge(KILLER, 32.0) is Verdict.FREE
    world.dies(C, 33.0, KILLER)
    assert world.deadly.judge(KILLER, 34.0) is Verdict.DEADLY


def test_request_is_free_when_others_were_lost_with_the_same_engines(world: World) -> None:
    """The next loss separates the deadly one from them."""
    world.dies(A, 0.0, KILLER, OTHER, "third")
    world.dies(B, 1.0, KILLER, OTHER)
    assert [world.deadly.judge(each, 2.0) for each in (KILLER, OTHER, "third")] == [Verdict.FREE] * 3
    world.dies(C, 3.0, KILLER)

    assert [world.deadly.judge(each, 4.0) for each in (KILLER, OTHER, "third")] == [
        Verdict.DEADLY,
        Verdict.FREE,
        Verdict.FREE,
    ]


def test_request_that_was_lost_avoids_engines_with_another_one(world: World) -> None:
    """So the next engine that dies tells which of them is deadly."""
    world.dies(A, 0.0, KILLER, OTHER)
    world.deadly.placed(KILLER, [B], 1.0)
    world.deadly.placed("never lost", [C], 1.0)

    assert world.deadly.occupied(OTHER, 1.5) == {B}
    assert world.deadly.occupied(KILLER, 1.5) == frozenset()
    assert world.deadly.occupied("never lost", 1.5) == frozenset()
    assert world.deadly.occupied(OTHER, 1.0 + APART_SECONDS) == frozenset()


def test_request_is_deadly_by_the_losses_of_all_replicas(world: World) -> None:
    """Each loss is published once, by the replica that had it."""
    world.dies(A, 0.0, KILLER)
    world.deadly.lost(KILLER, A, 0.1)
    assert world.deadly.heed(KILLER, B, 1.0)
    assert not world.deadly.heed(KILLER, B, 1.0)
    world.deadly.refused(B, 1.5)

    assert world.deadly.judge(KILLER, 2.0) is Verdict.DEADLY
    assert world.published == [(KILLER, A, 0.0)]


def test_request_whose_body_was_not_read_is_never_remembered(world: World) -> None:
    """All such requests have the same fingerprint."""
    world.dies(A, 0.0, "")

    assert len(world.deadly) == 0


def test_memory_is_bounded(world: World) -> None:
    """The oldest losses are forgotten, by number and by time."""
    for number in range(2 * MOST_REQUESTS):
        world.deadly.lost(f"request {number}", A, number / MOST_REQUESTS)
    assert len(world.deadly) == MOST_REQUESTS
    world.deadly.lost(KILLER, B, 3 * KEPT_SECONDS)

    assert len(world.deadly) == 1


def test_addresses_are_forgotten_with_their_requests(world: World) -> None:
    """Most engines that die never come back under their address."""
    for number in range(MOST_REQUESTS * 2):
        world.deadly.lost(f"request {number}", f"address {number}", 0.0)

    assert len(world.deadly._down) == MOST_REQUESTS
