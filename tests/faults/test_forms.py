"""Faults give the results of the table where the service sends the prefill leg, too."""

from collections.abc import Iterator

import pytest

from faults.fleet import Fleet, Form
from faults.matrix import CELLS, Cell, cells_of, run_cell, run_quick_fleet

REPRESENTATIVE = {
    "prefill, answers 500, one",
    "prefill, answers 500, all",
    "prefill, answers 400, all",
    "prefill, hangs, all",
    "prefill, resets before headers, all",
    "decode, refuses connections, all",
    "decode, is killed in mid-answer, all",
    "decode, gives the request up, one",
    "decode, gives the request up, all",
}
"""Cells in which each rule of the form decides; the others are in the table of docs/reliability.md."""


@pytest.fixture(scope="module", params=[Form.SERVICE, Form.PICKER, Form.PICKER_DUPLEX], ids=lambda form: form.name)
def running(request: pytest.FixtureRequest) -> Iterator[tuple[Form, Fleet]]:
    form: Form = request.param
    with run_quick_fleet(form) as fleet:
        yield form, fleet


@pytest.mark.parametrize("cell", [cell for cell in CELLS if str(cell) in REPRESENTATIVE], ids=str)
def test_a_fault_gives_the_result_of_the_table(running: tuple[Form, Fleet], cell: Cell) -> None:
    """Once the client has its result, no engine has a leg left, and no reservation is left."""
    form, fleet = running
    if cell in cells_of(form):
        assert run_cell(fleet, cell) == cell.expects(form)
