"""Bootstrap rooms: the numbers under which the two legs of an attempt find each other.

A server that follows rooms dispatches by ``room mod ranks``, and from 0.5.11 on a prefill server refuses a request
whose room says another rank than its body. A room that is congruent to the chosen rank suits every version.
"""

import math
from random import Random
from typing import Final

MAX_ROOM: Final = (1 << 63) - 1
"""SGLang's request contract takes a signed 64-bit integer (``api/v1/api_types.py``)."""


class NoSuchRoomError(ValueError):
    """No room is congruent to both ranks."""


def draw_room(rng: Random, prefill: tuple[int, int] | None, decode: tuple[int, int] | None = None) -> int:
    """Draw a room, uniformly from all in 1..2^63-1 that suit. 0 is never drawn: it reads as "not arrived" there.

    Args:
        rng: Where randomness comes from. Rooms of one fleet must not repeat, so replicas must not share a seed.
        prefill: ``(rank, ranks)`` that the room must lead to on the prefill server; None when that is unknown.
        decode: Likewise on a decode server that follows rooms itself.

    Raises:
        NoSuchRoomError: The two cannot be met by one room.
    """
    residue, modulus = prefill or (0, 1)
    if decode is not None:
        residue, modulus = _combine(residue, modulus, *decode)
    while True:
        number = rng.getrandbits(63)
        room = number - number % modulus + residue
        if 0 < room <= MAX_ROOM:
            return room


def agree(prefill: tuple[int, int], decode: tuple[int, int]) -> bool:
    """Tell whether some room leads to both ``(rank, ranks)``."""
    return (prefill[0] - decode[0]) % math.gcd(prefill[1], decode[1]) == 0


def _combine(a: int, m: int, b: int, n: int) -> tuple[int, int]:
    """Solve x = a (mod m), x = b (mod n) by the Chinese remainder theorem."""
    common = math.gcd(m, n)
    if (b - a) % common:
        raise NoSuchRoomError(f"no room is {a} mod {m} and {b} mod {n}")
    step = (b - a) // common * pow(m // common, -1, n // common) % (n // common)
    return a + m * step, m // common * n
