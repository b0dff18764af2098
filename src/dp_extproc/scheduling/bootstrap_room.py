"""Bootstrap rooms: the numbers under which the two legs of an attempt find each other.

An engine that follows bootstrap rooms runs a request on the rank ``room mod ranks``. From 0.5.11 on, a prefill engine
refuses a request whose body names another rank than that. A bootstrap room that is congruent to the picked rank suits
every release.
"""

import math
from random import Random
from typing import Final

MAX_ROOM: Final = (1 << 63) - 1
"""The largest bootstrap room: SGLang reads a signed 64-bit integer (``api/v1/api_types.py``)."""


class NoSuchRoomError(ValueError):
    """No bootstrap room is congruent to both ranks."""


def draw_room(rng: Random, prefill: tuple[int, int] | None, decode: tuple[int, int] | None = None) -> int:
    """Draw a bootstrap room, uniformly from all in 1..2^63-1 that suit. SGLang reads 0 as "not arrived".

    Args:
        rng: Source of randomness. Bootstrap rooms of one fleet must not repeat, so replicas must not share a seed.
        prefill: ``(rank, ranks)`` that it must lead to on the prefill engine; None if it need not.
        decode: ``(rank, ranks)`` that it must lead to on the decode engine; None if it need not.

    Raises:
        NoSuchRoomError: No bootstrap room leads to both.
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
    """Return whether some bootstrap room leads to both ``(rank, ranks)``."""
    return (prefill[0] - decode[0]) % math.gcd(prefill[1], decode[1]) == 0


def _combine(a: int, m: int, b: int, n: int) -> tuple[int, int]:
    """Solve x = a (mod m), x = b (mod n) by the Chinese remainder theorem."""
    common = math.gcd(m, n)
    if (b - a) % common:
        raise NoSuchRoomError(f"no room is {a} mod {m} and {b} mod {n}")
    step = (b - a) // common * pow(m // common, -1, n // common) % (n // common)
    return a + m * step, m // common * n
