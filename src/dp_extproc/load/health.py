"""Outlier ejection of one endpoint, by how its own legs of requests end.

An endpoint whose legs fail several times in a row is ejected, each time twice as long. Then it gets one request at a
time as a probe. An engine that was unreachable and reports its load again has recovered, as it is another process now.
The clock is the caller's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dp_extproc.config.reliability import OutlierDetectionSettings

PROBE_SECONDS: Final = 5.0
"""Seconds after which a probe without an outcome counts as lost, so that another request may be one."""
_MOST_DOUBLINGS: Final = 32
"""Bound on the exponent, so that no number of ejections overflows; the longest ejection is reached long before."""


@dataclass(slots=True, eq=False)
class Health:
    """The health of one endpoint."""

    settings: OutlierDetectionSettings
    changed: Callable[[], None] = lambda: None
    """Called at each ejection, and at the recovery from it."""
    failures: int = 0
    """Legs that have failed since the last success."""
    successes: int = 0
    """Legs that have succeeded, in all."""
    ejections: int = 0
    """Ejections in a row, without a success between them."""
    until: float = -math.inf
    """When the present or last ejection ends."""
    probed_at: float = -math.inf
    """When the last request was sent after an ejection."""

    @property
    def is_unhealthy(self) -> bool:
        """Whether the endpoint is ejected, or has not succeeded since."""
        return self.ejections > 0

    def succeeded(self) -> None:
        """Note that a leg has succeeded."""
        self.successes += 1
        self.recovered()

    def failed(self, now: float) -> None:
        """Note that a leg has failed by the endpoint's own fault."""
        if now < self.until:
            return  # the request was sent before the ejection
        self.failures += 1
        if self.ejections or self.failures >= self.settings.consecutive_failures:
            seconds = self.settings.base_ejection_time * 2.0 ** min(self.ejections, _MOST_DOUBLINGS)
            self.until = now + min(seconds, self.settings.max_ejection_time)
            self.ejections += 1
            self.probed_at = -math.inf
            self.changed()

    def recovered(self) -> None:
        """Clear the record: a leg has succeeded, or the engine is back after it was unreachable."""
        if self.failures:
            was_unhealthy, self.failures, self.ejections = self.is_unhealthy, 0, 0
            self.until = -math.inf
            if was_unhealthy:
                self.changed()

    def is_ejected(self, now: float) -> bool:
        return now < self.until

    def takes(self, now: float) -> bool:
        """Return whether the endpoint takes a request: none during an ejection, and one at a time after it."""
        return now >= self.until and (not self.ejections or now - self.probed_at >= PROBE_SECONDS)

    def sent(self, now: float) -> None:
        """Note that a request was sent; after an ejection it is the probe."""
        if self.ejections:
            self.probed_at = now
