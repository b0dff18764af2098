"""Whether an endpoint does its own leg of requests well enough to be sent more of them.

Passive: an endpoint whose leg fails several times in a row is ejected, each time twice as long. When the time is over
it gets one request to prove itself. An engine that could not be reached and prints its load page again is trusted at
once, as it is another process by now. The clock is the caller's.
"""

import math
from collections.abc import Callable
from typing import Final

from dp_extproc.config.reliability import OutlierDetectionSettings

PROBE_SECONDS: Final = 5.0
"""After so long without an outcome a probe counts as lost, and another request may be one."""
_MOST_DOUBLINGS: Final = 32


class Health:
    """One endpoint's record."""

    __slots__ = ("_changed", "_failures", "_probed", "_settings", "answers", "ejections", "until")

    def __init__(self, settings: OutlierDetectionSettings, changed: Callable[[], None] = lambda: None) -> None:
        """Begin healthy.

        Args:
            settings: When to eject.
            changed: Called at each ejection, and when the endpoint has recovered from the last one.
        """
        self._settings = settings
        self._changed = changed
        self._failures = 0
        self.answers = 0
        """Legs that went well, in all."""
        self._probed = -math.inf
        self.ejections = 0
        """In a row, without a success between them."""
        self.until = -math.inf
        """When the present or last ejection ends."""

    @property
    def is_unhealthy(self) -> bool:
        """Whether it is ejected, or has served nothing since it was."""
        return self.ejections > 0

    @property
    def is_doubtful(self) -> bool:
        """Whether it has failed since its last success."""
        return self._failures > 0

    def succeeded(self) -> None:
        """Note that a leg went well."""
        self.answers += 1
        self.recovered()

    def failed(self, now: float) -> None:
        """Note that a leg failed by the endpoint's own fault."""
        if now < self.until:
            return  # sent before the ejection
        self._failures += 1
        if self.ejections or self._failures >= self._settings.consecutive_failures:
            seconds = self._settings.base_ejection_time * 2.0 ** min(self.ejections, _MOST_DOUBLINGS)
            self.until = now + min(seconds, self._settings.max_ejection_time)
            self.ejections += 1
            self._probed = -math.inf
            self._changed()

    def recovered(self) -> None:
        """Clear the record: the engine was unreachable and has answered again, or has served a request."""
        if self._failures:
            was_unhealthy, self._failures, self.ejections = self.is_unhealthy, 0, 0
            self.until = -math.inf
            if was_unhealthy:
                self._changed()

    def is_ejected(self, now: float) -> bool:
        return now < self.until

    def takes(self, now: float) -> bool:
        """Tell whether it may be sent a request: not while it is ejected, and one at a time after that."""
        return now >= self.until and (not self.ejections or now - self._probed >= PROBE_SECONDS)

    def sent(self, now: float) -> None:
        """Note that it was sent a request; after an ejection this one is the probe."""
        if self.ejections:
            self._probed = now
