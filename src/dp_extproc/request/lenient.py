"""Reads scalars of a body in all forms in which engines take them.

SGLang reads bodies with pydantic in its lax mode: ``"2"`` and ``2.0`` are the integer 2, and ``"yes"`` and 1 are true.
Only ``/generate`` of 0.5.22 and later is strict (``entrypoints/api_contract.py``), and answers 400 by itself.

So a value that cannot be read here is left to the engine. Reading more than pydantic does is harmless. Reading less is
not: ``n`` must not exceed 1 in disguise.
"""

from typing import Any, Final

_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})


def as_bool(value: Any) -> bool:
    """Read a truth value; one that no engine takes is false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.lower() in _TRUE
    return isinstance(value, int | float) and value == 1


def as_integer(value: Any) -> int | None:
    """Read an integer; None if there is none."""
    if isinstance(value, str):
        try:
            value = float(value) if "." in value else int(value)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, int) else None
