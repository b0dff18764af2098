"""How often a request is placed anew."""

from dp_extproc.config.reliability import RetrySettings


class RetryBudget:
    """Bounds retries against storms: each request adds a part of one, each retry takes one."""

    __slots__ = ("_left", "_settings")

    def __init__(self, settings: RetrySettings) -> None:
        self._settings = settings
        self._left = float(settings.burst)

    def earn(self) -> None:
        """Note a request that was placed for the first time."""
        self._left = min(self._left + self._settings.budget, self._settings.burst)

    def spend(self, attempts: int) -> bool:
        """Ask whether a request that has failed may be placed anew.

        Args:
            attempts: How often it was placed, the failed one included.
        """
        if attempts >= self._settings.attempts or self._left < 1:
            return False
        self._left -= 1
        return True
