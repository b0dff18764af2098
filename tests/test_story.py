"""The way of a request through the code, as docs/development.md describes it, is the way that the code takes."""

import re
from pathlib import Path

import pytest

from test_layers import ROOT, imported_by

BUILDER = "runtime/components.py"
"""It builds the parts and hands them to each other, so a part may import no more than the protocol of another."""
PAGE = Path(__file__).parents[1] / "docs" / "development.md"
HEADING = "## A request, step by step\n"
MOST_MODULES = 15
MODULES = re.findall(r"^\d+\. `([\w/]+\.py)`", PAGE.read_text(encoding="utf-8").partition(HEADING)[2], re.MULTILINE)


def test_the_story_is_short_and_complete() -> None:
    """It begins with a gRPC message and ends where reservations are released."""
    assert 5 <= len(MODULES) <= MOST_MODULES
    assert len(set(MODULES)) == len(MODULES)
    assert MODULES[0] == "extproc/service.py"
    assert MODULES[-1] == "load/in_flight.py"


@pytest.mark.parametrize("number", range(len(MODULES)))
def test_a_reader_finds_each_module_in_one_before(number: int) -> None:
    """Whoever reads in this order meets each name as an import first."""
    module = MODULES[number]
    assert (ROOT / module).is_file()
    if number:
        assert any(module in imported_by(before) for before in (BUILDER, *MODULES[:number]))
