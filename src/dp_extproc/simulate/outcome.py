"""What came of a run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_WARM_UP = 0.05
"""Share of the requests at the start that is left out: they meet an empty fleet."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times in seconds."""

    number: int
    first_token: float
    per_token: float | None
    """Per output token behind the first; None if there is none."""
    total: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """All of them."""

    outcomes: Sequence[Outcome]
    wait_share: float
    """Of the time in prefill steps the part that ranks waited for the fullest one."""

    def summary(self) -> dict[str, float]:
        """Give mean, p50 and p99 of each time in milliseconds, and the wait share."""
        kept = [outcome for outcome in self.outcomes if outcome.number >= _WARM_UP * len(self.outcomes)]
        numbers = {
            "ttft": [outcome.first_token for outcome in kept],
            "tpot": [outcome.per_token for outcome in kept if outcome.per_token is not None],
            "e2e": [outcome.total for outcome in kept],
        }
        summary = {"wait": self.wait_share}
        for name, values in numbers.items():
            if values:
                ordered = sorted(values)
                summary[f"{name}_mean"] = statistics.fmean(ordered) * 1000
                summary[f"{name}_p50"] = ordered[len(ordered) // 2] * 1000
                summary[f"{name}_p99"] = ordered[int(len(ordered) * 0.99)] * 1000
        return summary
