"""The part of ``dp-extproc check`` that compares an Envoy with the configuration."""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from dp_extproc.config import Config
from dp_extproc.envoy_check import Finding, Severity, Snapshot, audit
from dp_extproc.envoy_check.reader import read_envoy

_STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow"}


def check_envoy(console: Console, config: Config, sources: Sequence[str]) -> bool:
    """Compare an Envoy with what *config* needs there, and print what is missing or wrong.

    Returns:
        Whether there are no errors. Warnings are none.

    Raises:
        UnreadableError: A source cannot be read.
    """
    snapshot = asyncio.run(read_envoy(sources))
    findings = audit(snapshot, config)
    _print(console, ", ".join(sources), snapshot, findings)
    return all(each.severity is not Severity.ERROR for each in findings)


def _print(console: Console, name: str, snapshot: Snapshot, findings: Sequence[Finding]) -> None:
    release = f"Envoy {'.'.join(map(str, snapshot.version))}, " if snapshot.version else ""
    counts = f"{len(snapshot.listeners)} listeners, {len(snapshot.clusters)} clusters"
    console.print(Text(f"{name}: {release}{counts}"), soft_wrap=True)
    places: dict[Finding, list[str]] = {}
    for each in findings:
        places.setdefault(replace(each, place=""), []).append(each.place)
    for each, found in places.items():
        console.print(Text(f"{each.code}: {'; '.join(found)}", _STYLES[each.severity]), soft_wrap=True)
        console.print(Text(f"  what happens: {each.effect}"), soft_wrap=True)
        console.print(Text(f"  remedy: {each.remedy}"), soft_wrap=True)
    errors = sum(each.severity is Severity.ERROR for each in findings)
    if errors:
        count = f"{errors} errors" if errors > 1 else "1 error"
        console.print(Text(f"{count} in the configuration of Envoy", style="red"))
    else:
        console.print(Text("the configuration of Envoy can be used", style="green"))
