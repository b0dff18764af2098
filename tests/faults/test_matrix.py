"""Every fault on every part: what the client gets, what engines are left with, what is left on the books."""

from collections.abc import Iterator

import pytest

from faults.fleet import Fleet
from faults.matrix import CELLS, KINDS, Cell, run_cell, run_quick_fleet


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with run_quick_fleet() as fleet:
        yield fleet


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault(fleet: Fleet, cell: Cell) -> None:
    """The client gets what the table says; then no engine has a leg left, and nothing is on the books."""
    outcomes = run_cell(fleet, cell)

    assert outcomes == {(path, stream): cell.expects(stream=stream) for path, stream in KINDS}
