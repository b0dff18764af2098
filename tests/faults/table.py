"""``python -m faults.table [FILE]`` runs every cell, prints the results, and puts them between the marks of a page."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from faults.matrix import CELLS, Cell, Outcomes, run_cell, run_quick_fleet

BEGIN: Final = "<!-- begin faults -->"
END: Final = "<!-- end faults -->"
_HEAD: Final = """\
`answer` means that the client gets the whole response, possibly after another attempt. `part of the answer` means that
the response ends immediately after its first bytes. Anything else is a status, with the reason of the service or Envoy,
or with the engine's own text. Results are the same for chats and `/generate`, whole responses and streams, unless the
table shows a difference. After each cell no engine had a leg left and no reservation was left.

| part | what it does | one of two does it | all do it |
|---|---|---|---|
"""


def describe(outcomes: Outcomes) -> str:
    """Describe in one line what clients got, by path and form only if that differs."""
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    by_form = {stream: {outcome for (_, s), outcome in outcomes.items() if s is stream} for stream in (False, True)}
    if all(len(each) == 1 for each in by_form.values()):
        return f"{min(by_form[False])}; streams: {min(by_form[True])}"
    return "; ".join(f"{path}{', stream' if stream else ''}: {each}" for (path, stream), each in outcomes.items())


def as_table(results: Sequence[tuple[Cell, Outcomes]]) -> str:
    """Write the results as a Markdown table."""
    rows: dict[tuple[str, str], dict[bool, str]] = {}
    for cell, outcomes in results:
        rows.setdefault((cell.part, cell.fault), {})[cell.everywhere] = describe(outcomes)
    lines = [
        f"| {part} | {fault} | {columns.get(False, '')} | {columns[True]} |" for (part, fault), columns in rows.items()
    ]
    return _HEAD + "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run all cells.

    Returns:
        1 if a client got an unexpected result.
    """
    results: list[tuple[Cell, Outcomes]] = []
    surprises = 0
    began = time.monotonic()
    with run_quick_fleet() as fleet:
        for cell in CELLS:
            outcomes = run_cell(fleet, cell)
            results.append((cell, outcomes))
            if any(outcome != cell.expects(stream=stream) for (_, stream), outcome in outcomes.items()):
                surprises += 1
                sys.stderr.write(f"{cell}: {describe(outcomes)}, not {cell.expected}\n")
    table = as_table(results)
    sys.stdout.write(table)
    sys.stderr.write(f"{len(results)} cells in {time.monotonic() - began:.0f} s, {surprises} of them unexpected\n")
    for name in arguments:
        page = Path(name)
        text = page.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
