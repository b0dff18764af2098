"""Writes what the clients showed as tables."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from interop.clients.cases import CASES, CLIENTS, Case, Client

BEGIN: Final = "<!-- made by make clients -->"
END: Final = "<!-- end -->"
_MOST: Final = 160
"""Letters that a line shows of an error."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a client showed in a case."""

    client: Client
    case: Case
    stream: bool
    shown: str
    is_good: bool

    def line(self) -> str:
        """Write one line for the terminal."""
        verdict = "ok  " if self.is_good else "FAIL"
        form = "stream" if self.stream else "whole"
        shown = " ".join(self.shown.split())
        return f"{verdict} {self.client.language} {self.client.name}: {self.case.name} ({form}): {shown[:_MOST]}"


def write_page(page: Path, results: Sequence[Result], clients: Path) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{_tables(results, clients)}\n{END}{after}", encoding="utf-8")


def _tables(results: Sequence[Result], clients: Path) -> str:
    versions = _versions(clients)
    head = ["client", *(case.name for case in CASES)]
    rows = [head, ["---"] * len(head)]
    for client in CLIENTS:
        cells = [_cell([it for it in results if it.client == client and it.case == case]) for case in CASES]
        rows.append(
            [f"{client.language}: {client.package} {versions[client.language, client.package]}, {client.api}", *cells]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return ""
    bad = [it for it in results if not it.is_good]
    if not bad:
        return "yes"
    forms = "" if len(bad) == len(results) else "stream: " if bad[0].stream else "whole: "
    return f"**no**: {forms}{' '.join(bad[0].shown.split())[:60].replace('|', '/')}"


def _versions(clients: Path) -> dict[tuple[str, str], str]:
    pip = [str(clients / "venv/bin/python"), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    found = {each["name"]: each["version"] for each in json.loads(subprocess.check_output(pip))}
    versions = {}
    for client in CLIENTS:
        if client.language == "Node":
            package = json.loads((clients / "node_modules" / client.package / "package.json").read_bytes())
            found_version = package["version"]
        else:
            found_version = found.get(client.package, "")
        versions[client.language, client.package] = found_version
    return versions
