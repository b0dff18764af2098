"""``python -m faults.table [FILE]`` runs every cell, prints the results, and puts them between the marks of a page.

``--forms NAME...`` runs some of the forms alone, and changes no page.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from faults.fleet import Form
from faults.matrix import Cell, Outcomes, cells_of, run_cell, run_quick_fleet

_GATEWAYS: Final = (Form.PICKER, Form.PICKER_DUPLEX, Form.PICKER_BUFFERED)
_VARIANTS: Final = ("responses in full duplex", "buffered requests")
"""How the other gateways differ from the first."""
_HEAD_OF_FORMS: Final = """\
| part | what it does | bundled Envoy: one of two does it | all do it | another gateway: it meets the fault |
|---|---|---|---|---|
"""
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


Results = Sequence[tuple[Cell, Outcomes]]


def as_table(results: Results) -> str:
    """Write the results of mirrored legs as a Markdown table."""
    rows: dict[tuple[str, str], dict[bool, str]] = {}
    for cell, outcomes in results:
        rows.setdefault((cell.part, cell.fault), {})[cell.everywhere] = describe(outcomes)
    lines = [
        f"| {part} | {fault} | {columns.get(False, '')} | {columns[True]} |" for (part, fault), columns in rows.items()
    ]
    return _HEAD + "\n".join(lines) + "\n"


def as_table_of_forms(results: Mapping[Form, Results]) -> str:
    """Write the results of the forms in which the service sends the leg as a Markdown table."""
    found = {form: {cell.place: describe(outcomes) for cell, outcomes in each} for form, each in results.items()}
    lines = []
    for part, fault in dict.fromkeys((cell.part, cell.fault) for cell in cells_of(Form.SERVICE)):
        own = [found[Form.SERVICE].get((part, fault, everywhere), "") for everywhere in (False, True)]
        usual, *others = (found[form][part, fault, True] for form in _GATEWAYS)
        behind = [f"{name}: {each}" for name, each in zip(_VARIANTS, others, strict=True) if each != usual]
        lines.append(f"| {part} | {fault} | {own[0]} | {own[1]} | {'; '.join([usual, *behind])} |")
    return _HEAD_OF_FORMS + "\n".join(lines) + "\n"


def run(form: Form) -> tuple[Results, int]:
    """Run all cells of a form; also returns the number of unexpected results."""
    results: list[tuple[Cell, Outcomes]] = []
    surprises = 0
    began = time.monotonic()
    with run_quick_fleet(form) as fleet:
        for cell in cells_of(form):
            outcomes = run_cell(fleet, cell)
            results.append((cell, outcomes))
            if outcomes != cell.expects(form):
                surprises += 1
                expected = describe(cell.expects(form))
                sys.stderr.write(f"{form.name}: {cell}: {describe(outcomes)}, not {expected}\n")
    seconds = time.monotonic() - began
    sys.stderr.write(f"{form.name}: {len(results)} cells in {seconds:.0f} s, {surprises} of them unexpected\n")
    return results, surprises


def main() -> int:
    """Run all cells.

    Returns:
        1 if a client got an unexpected result.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--forms", nargs="+", choices=Form.__members__, default=[])
    args = parser.parse_args()
    forms = [Form[name] for name in args.forms] or list(Form)
    found = {form: run(form) for form in forms}
    results = {form: each for form, (each, _) in found.items()}
    tables = {}
    if Form.MIRRORED in results:
        tables["faults"] = as_table(results[Form.MIRRORED])
    if set(results) >= {Form.SERVICE, *_GATEWAYS}:
        tables["faults of forms"] = as_table_of_forms(results)
    for name, table in tables.items():
        sys.stdout.write(table)
        for page in args.pages:
            text = page.read_text(encoding="utf-8")
            begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
            before, after = text.partition(begin)[0], text.partition(end)[2]
            page.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")
    return 1 if any(surprises for _, surprises in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
