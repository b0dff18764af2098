"""Rules for the Envoy as a whole: its version, its state, and updates that it rejected."""

from collections.abc import Iterator
from typing import Final

from dp_extproc.envoy_check.facts import Facts
from dp_extproc.envoy_check.findings import Finding, finding

OLDEST: Final = (1, 36)
"""First supported version of Envoy. Earlier ones lack ``remove_on_match`` and ``status_on_error``."""
TESTED: Final = (1, 40)
"""Last version on which the tests ran."""
_PLACE: Final = "Envoy"
_SHORT_DRAIN: Final = 600.0
"""Envoy's default of ``--drain-time-s`` in seconds. Some gateways set less, and streams may be longer."""


def version(facts: Facts) -> Iterator[Finding]:
    """Compare Envoy's version with the supported ones."""
    if (found := facts.snapshot.version) is None:
        return
    text, oldest, tested = (".".join(map(str, each)) for each in (found, OLDEST, TESTED))
    if found[:2] < OLDEST:
        yield finding("version_not_supported", _PLACE, version=text, oldest=oldest)
    elif found[:2] > TESTED:
        yield finding("version_not_tested", _PLACE, version=text, tested=f"{oldest} to {tested}")


def state(facts: Facts) -> Iterator[Finding]:
    """Look whether Envoy has finished its start, and how long it drains listeners."""
    if (found := facts.snapshot.state) is not None and found != "LIVE":
        yield finding("not_live", _PLACE, state=found)
    seconds = facts.snapshot.drain_seconds
    if seconds is not None and seconds < _SHORT_DRAIN:
        yield finding("short_drain", _PLACE, seconds=seconds)


def rejected(facts: Facts) -> Iterator[Finding]:
    """Report each update that Envoy rejected."""
    for each in facts.snapshot.rejected:
        code = "update_rejected" if each.name in facts.names_of_block else "foreign_update_rejected"
        yield finding(code, f"{each.kind} {each.name}", details=" ".join(each.details.split()))
