"""Draw the times at which requests arrive."""

from collections.abc import Iterator
from random import Random
from typing import Final

BURST_SECONDS: Final = 5.0
CALM_SECONDS: Final = 15.0


def arrivals(rng: Random, rate: float, burst: float = 1.0) -> Iterator[float]:
    """Yield the times of a Poisson process, in seconds, without end.

    Args:
        rng: Drawn from between one arrival and the next.
        rate: Requests per second, on average.
        burst: For the first 5 of every 20 seconds so many times the rate, and less in between; 1 for a steady one.

    Raises:
        ValueError: A burst has more than all the requests there are, or the rate is none.
    """
    period = BURST_SECONDS + CALM_SECONDS
    calm = (period - burst * BURST_SECONDS) / CALM_SECONDS
    if rate <= 0 or burst < 0 or calm < 0:
        raise ValueError(f"no such arrivals: {rate} per second, {burst} times that in bursts of a quarter of the time")
    highest, now = max(burst, calm), 0.0
    while True:
        now += rng.expovariate(rate * highest)
        # Thinning: candidates come at the highest rate there is, and stay with the share that the present one has.
        if rng.random() * highest < (burst if now % period < BURST_SECONDS else calm):
            yield now
