"""Metrics of the prefill legs that the service sends, and of the responses that it holds for them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from dp_extproc.legs.listener import LegOutcome, ResendCause

_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds in seconds. Prefill takes from tens of milliseconds to minutes, its queue included."""


class Durations:
    """Counts durations, as plain numbers."""

    def __init__(self, buckets: Sequence[float] = _BUCKETS) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._buckets, seconds)] += 1
        self._seconds += seconds

    def metric(self, name: str, text: str) -> Metric:
        bounds = [*map(str, self._buckets), "+Inf"]
        counts = accumulate(map(float, self._counts))
        return HistogramMetricFamily(
            name, text, buckets=list(zip(bounds, counts, strict=True)), sum_value=self._seconds
        )


class LegMetrics:
    """Counts requests of the HTTP client: prefill legs, or aborts of decode legs."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.outcomes: Counter[str] = Counter()
        self.resends: Counter[str] = Counter()
        self.seconds = Durations()

    def leg_sent(self) -> None:
        self.in_flight += 1

    def leg_resent(self, cause: ResendCause) -> None:
        self.resends[cause.value] += 1

    def leg_ended(self, outcome: LegOutcome, seconds: float) -> None:
        self.in_flight -= outcome is not LegOutcome.DROPPED
        self.outcomes[outcome.value] += 1
        self.seconds.add(seconds)


class SentLegMetrics:
    """Collects the metrics of prefill legs that the service sends."""

    def __init__(self, *, sends_legs: bool = True) -> None:
        """Set up; without *sends_legs* only aborts of decode legs are collected."""
        self.legs = LegMetrics()
        self.aborts = LegMetrics()
        self._sends_legs = sends_legs

    def collect(self) -> Iterator[Metric]:
        yield from self._of_legs() if self._sends_legs else ()
        yield _by_label(
            "dp_extproc_decode_aborts",
            "Requests to engines to end a leg that they would compute in vain, of any role, by their outcome.",
            "outcome",
            self.aborts.outcomes,
        )

    def _of_legs(self) -> Iterator[Metric]:
        legs = self.legs
        yield _by_label("dp_extproc_prefill_legs", "Prefill legs that the service sent.", "outcome", legs.outcomes)
        yield _by_label("dp_extproc_prefill_leg_resends", "Prefill legs that were sent again.", "cause", legs.resends)
        yield GaugeMetricFamily(
            "dp_extproc_prefill_legs_in_flight", "Prefill legs that have not ended.", value=legs.in_flight
        )
        yield legs.seconds.metric("dp_extproc_prefill_leg_seconds", "Duration of prefill legs.")


def _by_label(name: str, text: str, label: str, counts: Counter[str]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        counter.add_metric([value], count)
    return counter
