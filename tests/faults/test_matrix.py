"""Every fault on every part gives the client the result of the table, and leaves no leg and no reservation."""

from collections.abc import Iterator

import pytest

from faults.fleet import Fleet
from faults.matrix import CELLS, Cell, run_cell, run_quick_fleet


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with run_quick_fleet() as fleet:
        yield fleet


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault_gives_the_result_of_the_table(fleet: Fleet, cell: Cell) -> None:
    """Once the client has its result, no engine has a leg left, and no reservation is left."""
    assert run_cell(fleet, cell) == cell.expects()


TRIES = 50
"""An idle fleet uses the engine that was a little faster before, or either of two."""
OTHER_PATHS = {
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "m", "max_output_tokens": 5, "input": "hello"},
}


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_a_stream_is_retried_on_other_paths_if_it_begins_with_an_error(fleet: Fleet, path: str) -> None:
    """Whatever an API calls its first event, there is another attempt, and then a status that shows the failure."""
    asked = {**OTHER_PATHS[path], "stream": True}
    fleet.forget()
    fleet.client.post(path, json=asked)
    (first,) = [engine for engine in fleet.decodes if engine.requests()]
    first.fault(inference="fail")
    for _ in range(TRIES):
        answer = fleet.client.post(path, json=asked)
        assert answer.status_code == 200
        assert not {"event: error", "event: response.failed"} & {*answer.text.splitlines()}
        if any(record["fault"] for record in first.requests()):
            break
    else:
        pytest.fail("no request has met the fault")
    for engine in fleet.decodes:
        engine.fault(inference="fail")
    refused = fleet.client.post(path, json=asked)
    fleet.settle()
    fleet.recover()

    assert refused.status_code == 502
    assert refused.headers["x-dp-extproc-reason"] == "decode_failed"
