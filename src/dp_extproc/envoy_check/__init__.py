"""Compares an Envoy that another team configures with what dp-extproc needs there."""

from dp_extproc.envoy_check.audit import audit
from dp_extproc.envoy_check.findings import Finding, Severity
from dp_extproc.envoy_check.messages import UnreadableError
from dp_extproc.envoy_check.snapshot import Snapshot

__all__ = ["Finding", "Severity", "Snapshot", "UnreadableError", "audit"]
