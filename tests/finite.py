"""Whether what the admin port shows can be read by others: numbers that are numbers, JSON that is JSON."""

import json
import math
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def assert_finite(metrics: str, loads: dict[str, Any] | str) -> None:
    """Hold both pages to it: every number is finite, and /loads is JSON by its standard, which has no others."""
    values = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    assert values
    assert [sample for sample in values if not math.isfinite(sample.value)] == []
    text = loads if isinstance(loads, str) else json.dumps(loads, allow_nan=False)
    json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
