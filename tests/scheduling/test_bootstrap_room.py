"""Bootstrap rooms lead both engines to the picked ranks, whatever their numbers of ranks."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.scheduling.bootstrap_room import MAX_ROOM, NoSuchRoomError, agree, draw_room

RANKED = st.integers(1, 64).flatmap(lambda ranks: st.tuples(st.integers(0, ranks - 1), st.just(ranks)))


@given(prefill=RANKED, seed=st.integers())
def test_room_is_congruent_to_the_prefill_rank(prefill: tuple[int, int], seed: int) -> None:
    """A drawn bootstrap room is in 1..2^63-1 and leads to the rank."""
    room = draw_room(Random(seed), prefill)

    assert 1 <= room <= MAX_ROOM
    assert room % prefill[1] == prefill[0]


@given(prefill=RANKED, decode=RANKED, seed=st.integers())
def test_room_is_congruent_to_both_ranks_or_an_error(
    prefill: tuple[int, int], decode: tuple[int, int], seed: int
) -> None:
    """A bootstrap room for both engines exists exactly if the ranks agree modulo the common divisor."""
    if agree(prefill, decode):
        room = draw_room(Random(seed), prefill, decode)

        assert 1 <= room <= MAX_ROOM
        assert (room % prefill[1], room % decode[1]) == (prefill[0], decode[0])
    else:
        assert (prefill[0] - decode[0]) % math.gcd(prefill[1], decode[1]) != 0
        with pytest.raises(NoSuchRoomError):
            draw_room(Random(seed), prefill, decode)


class _From(Random):
    """Draws consecutive numbers, upwards or downwards."""

    def __init__(self, first: int, step: int) -> None:
        super().__init__()
        self._next = first
        self._step = step

    def getrandbits(self, k: int) -> int:
        number, self._next = self._next, self._next + self._step
        return number


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 32])
def test_room_stays_within_its_bounds(ranks: int) -> None:
    """The least one is never 0, which SGLang reads as "not arrived"; the greatest fits a signed 64-bit integer."""
    for rank in range(ranks):
        least, greatest = (draw_room(_From(*draws), (rank, ranks)) for draws in ((0, 1), (MAX_ROOM, -1)))

        assert least == (rank or ranks)
        assert MAX_ROOM - ranks < greatest <= MAX_ROOM


def test_rooms_spread_over_the_whole_range() -> None:
    """Bootstrap rooms of one rank are uniform over 1..2^63-1: each quarter gets about a quarter of them."""
    rng = Random(7)
    quarters = [0] * 4
    for _ in range(4000):
        quarters[draw_room(rng, (3, 8)) * 4 // (MAX_ROOM + 1)] += 1

    assert all(850 < count < 1150 for count in quarters)
