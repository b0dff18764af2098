"""How long fuzzing takes: a few seconds with every test run, as long as one likes with DP_EXTPROC_FUZZ."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

_TIMES = float(os.environ.get("DP_EXTPROC_FUZZ", "1"))
"""How many times as many examples as usual."""


def examples(count: int) -> Callable[[Any], Any]:
    """Have a property tested with so many examples."""
    return settings(max_examples=max(1, round(count * _TIMES)), deadline=None, suppress_health_check=list(HealthCheck))
