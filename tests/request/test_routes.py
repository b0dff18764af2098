"""The table of routes is the documented one, and each of its rows does what it says, through a real Envoy."""

import re
from pathlib import Path

from dp_extproc.request.routes import ROUTES, Route

PAGE = Path(__file__).parents[2] / "docs" / "engines" / "routes.md"
_ROW = re.compile(r"\| `(/[^`{ ]*)[^`]*` \| ([A-Z, ]+) \| ([^|]+) \| (?:SGLang|vLLM)[^|]* \|")


def shown(route: Route) -> tuple[str, tuple[str, ...], str]:
    cause = "" if route.cause is None else f": {route.cause.name.lower().replace('_', ' ')}"
    return route.path, route.methods, f"{route.treatment.value}{cause}"


def test_documented_table_is_that_of_the_code() -> None:
    """The same routes in the same order, with their methods and treatment."""
    rows = [_ROW.fullmatch(line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `/")]
    documented = [(row[1], tuple(row[2].split(", ")), row[3]) for row in rows if row is not None]

    assert None not in rows
    assert documented == [shown(route) for route in ROUTES]
