"""How often a request is placed anew, and what is known of its attempts so far.

Each attempt comes from the front door as if it were the first, maybe to another process; what has failed travels with
it in a header: the hosts of an attempt joined by commas, attempts by semicolons.
"""

from typing import Final

from dp_extproc.config.reliability import RetrySettings

_MOST_READ: Final = 16
"""Attempts; more than may be configured."""


CUT: Final = "cut"
"""Third item of an attempt that Envoy has repeated by itself, as the answering server was lost behind its head."""


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


def read_failed(header: str | None) -> tuple[frozenset[str], ...]:
    """Read which hosts each earlier attempt was sent to."""
    if not header:
        return ()
    return tuple(frozenset(attempt.split(",")) - {CUT} for attempt in header.split(";", _MOST_READ)[:_MOST_READ])


def read_cut(header: str | None) -> str | None:
    """Read which server the last attempt has lost, if nobody has counted that yet: Envoy asks nobody about it."""
    hosts = (header or "").rpartition(";")[2].split(",")
    return hosts[1] if len(hosts) > 2 and hosts[2] == CUT else None


def write_failed(*hosts: str) -> bytes:
    """Write which hosts an attempt was sent to."""
    return ",".join(hosts).encode()
