"""The rules of an audit, by the protocol of the configuration."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from dp_extproc.config import Config, Protocol
from dp_extproc.envoy_check import block, whole
from dp_extproc.envoy_check.entrance import entrance
from dp_extproc.envoy_check.facts import Facts
from dp_extproc.envoy_check.findings import Finding, Severity
from dp_extproc.envoy_check.picker import picker
from dp_extproc.envoy_check.snapshot import Snapshot

Rule = Callable[[Facts], Iterable[Finding]]

_WHOLE: Final[tuple[Rule, ...]] = (whole.version, whole.state, whole.rejected)
RULES: Final[Mapping[Protocol, tuple[Rule, ...]]] = {
    Protocol.ENVOY: (
        *_WHOLE,
        block.extension,
        block.runtime,
        block.twice,
        block.present,
        block.breakers,
        block.ejection,
        block.exposed,
        entrance,
    ),
    Protocol.ENDPOINT_PICKER: (*_WHOLE, picker),
}
"""What is checked, in the order of the findings."""


def audit(snapshot: Snapshot, config: Config) -> list[Finding]:
    """Compare an Envoy with what a configuration needs. Errors come first, each finding once."""
    facts = Facts.of(snapshot, config)
    found = [each for rule in RULES[config.protocol] for each in rule(facts)]
    return sorted(dict.fromkeys([*found, *facts.not_read]), key=lambda each: each.severity is not Severity.ERROR)
