"""In full-duplex mode Envoy sends bodies in chunks and ignores requests for those of responses."""

from collections.abc import Iterator

import pytest

from faults.fleet import Fleet
from faults.matrix import CELLS, IN_FULL_DUPLEX, Cell, run_cell, run_quick_fleet


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with run_quick_fleet(body_mode="full_duplex_streamed") as fleet:
        yield fleet


@pytest.mark.parametrize("cell", [each for each in CELLS if each.place in IN_FULL_DUPLEX], ids=str)
def test_a_fault_gives_the_result_of_the_table(fleet: Fleet, cell: Cell) -> None:
    """The client gets the same result as with buffered bodies."""
    assert run_cell(fleet, cell) == cell.expects()
