"""Faults where Envoy sends bodies in chunks, and does not listen when it is asked for those of answers."""

from collections.abc import Iterator

import pytest

from faults.fleet import Fleet
from faults.matrix import CELLS, IN_DUPLEX, KINDS, Cell, run_cell, run_quick_fleet


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with run_quick_fleet("full_duplex_streamed") as fleet:
        yield fleet


@pytest.mark.parametrize("cell", [each for each in CELLS if each.place in IN_DUPLEX], ids=str)
def test_a_fault(fleet: Fleet, cell: Cell) -> None:
    """The client gets the same as with whole bodies."""
    outcomes = run_cell(fleet, cell)

    assert outcomes == {(path, stream): cell.expects(stream=stream) for path, stream in KINDS}
