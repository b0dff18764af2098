"""Outlier ejection of one endpoint, by how its own legs of requests end.

An endpoint whose legs fail several times in a row is ejected, each time twice as long. Then it gets one request at a
time as a probe. An engine that was unreachable and reports its load again has recovered, as it is another process now.
The clock is the caller's.
"""

import math
from collections.abc import Callable
from typing import Final

from dp_extproc.config.reliability import OutlierDetectionSettings

PROBE_SECONDS: Final = 5.0
"""Seconds after which a probe without an outcome counts as lost, so that another request may be one."""
_MOST_DOUBLINGS: Final = 32
"""Bound on the exponent, so that no number of ejections overflows; the longest ejection is reached long before."""


class Health:
    """The health of one endpoint."""

    def __init__(self, settings: OutlierDetectionSettings, changed: Callable[[], None] = lambda: None) -> None:
        """Begin healthy. *changed* is called at each ejection, and at the recovery from it."""
        self._settings = settings
        self._changed = changed
        self.failures = 0
        """Legs that have failed since the last success."""
        self.successes = 0
        """Legs that have succeeded, in all."""
        self._probed = -math.inf
        """When the last probe was sent."""
        self.ejections = 0
        """Ejections in a row, without a success between them."""
        self.until = -math.inf
        """When the present or last ejection ends."""

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
        if self.ejections or self.failures >= self._settings.consecutive_failures:
            seconds = self._settings.base_ejection_time * 2.0 ** min(self.ejections, _MOST_DOUBLINGS)
            self.until = now + min(seconds, self._settings.max_ejection_time)
            self.ejections += 1
            self._probed = -math.inf
            self._changed()

    def recovered(self) -> None:
        """Clear the record: a leg has succeeded, or the engine is back after it was unreachable."""
        if self.failures:
            was_unhealthy, self.failures, self.ejections = self.is_unhealthy, 0, 0
            self.until = -math.inf
            if was_unhealthy:
                self._changed()

    def is_ejected(self, now: float) -> bool:
        return now < self.until

    def takes(self, now: float) -> bool:
        """Return whether the endpoint takes a request: none during an ejection, and one at a time after it."""
        return now >= self.until and (not self.ejections or now - self._probed >= PROBE_SECONDS)

    def sent(self, now: float) -> None:
        """Note that a request was sent; after an ejection it is the probe."""
        if self.ejections:
            self._probed = now
