"""Keeps the garbage collections of Python short and rare, since each of them holds up every request."""

import gc
from typing import Final

_THRESHOLDS: Final = (10_000, 20, 50)
"""Thresholds of the three generations. Reference counts free nearly everything; collections only find cycles, such as
those of exceptions. Python's own are 700, 10, 10, by which 256 endpoints that appear cause full collections."""


def tune_collections() -> None:
    """Leave all objects that exist now, such as modules and classes, out of later collections, and make those rare.

    With the present objects, and beside 256 endpoints, a full collection took 64 to 86 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
