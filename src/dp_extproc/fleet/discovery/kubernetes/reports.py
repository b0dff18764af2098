"""Turns what is kept of slices or pods into the reports of a source."""

import logging
from collections.abc import Collection
from typing import Final

from dp_extproc.fleet.discovery.kubernetes.parts import Found, Part, combine
from dp_extproc.fleet.discovery.source import SourceListener

_SHOWN_PROBLEMS: Final = 3

_log = logging.getLogger(__name__)


class MemberReports:
    """Reports the members of all objects to the listener of a source."""

    def __init__(self, name: str, listener: SourceListener) -> None:
        """Set up; *name* is that of the source, for the log."""
        self._name = name
        self._listener = listener
        self._last: Found | None = None
        self._warned: tuple[str, ...] = ()
        """Problems of some objects that the log has."""

    def objects(self, parts: Collection[Part]) -> None:
        """Report the members of all present objects."""
        found = self._last = combine(parts)
        if found.problems and not found.members:
            self._listener.failed(_shown(found))
            return
        if found.problems and found.problems != self._warned:
            _log.warning("%s: %s", self._name, _shown(found))
        self._warned = found.problems
        self._listener.snapshot(found.members)

    def repeat(self) -> None:
        """Report the last members again, if there was a report."""
        if self._last is not None and (self._last.members or not self._last.problems):
            self._listener.snapshot(self._last.members)

    def forget(self) -> None:
        """Have nothing to repeat, because other objects are read from now on."""
        self._last = None

    def failed(self, message: str) -> None:
        """Report why the members are unknown."""
        self._listener.failed(message)


def _shown(found: Found) -> str:
    more = len(found.problems) - _SHOWN_PROBLEMS
    return "; ".join(found.problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
