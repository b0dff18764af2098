"""Record the results of a run."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WARM_UP = 0.05
"""Share of the requests at the start that is left out: the fleet is empty then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one request. Times in seconds."""

    number: int
    first_token: float
    per_token: float | None
    """Time per output token after the first; None if there is none."""
    total: float
    tokens: int
    """Tokens of prompt and answer: its size in the KV cache of decode at the end."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The results of all requests."""

    outcomes: Sequence[Outcome]
    wait_share: float
    """Share of the time in prefill steps in which ranks waited for the fullest one."""

    def summary(self) -> dict[str, float]:
        """Return mean, p50 and p99 of each time in milliseconds, and the wait share.

        The time per output token is there for short and long requests apart, too: see :func:`_by_length`.
        """
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
        for name, values in _by_length(kept).items():
            if values:
                summary[f"{name}_mean"] = statistics.fmean(values) * 1000
        return summary


def _by_length(outcomes: Iterable[Outcome]) -> dict[str, list[float]]:
    """Return the times per output token of the short half, the long half and the longest tenth of the requests.

    The number of tokens of a request is the same for every router, so the same requests are compared.
    """
    ordered = sorted((each.tokens, each.number, each.per_token) for each in outcomes if each.per_token is not None)
    values = [per_token for _, _, per_token in ordered]
    half, tenth = len(values) // 2, math.ceil(len(values) / 10)
    return {
        "tpot_short": values[:half],
        "tpot_long": values[half:],
        "tpot_longest": values[len(values) - tenth :],
    }
