"""Every fault on every part: what the client gets, what engines are left with, what is left on the books."""

from collections.abc import Iterator

import pytest

from e2e.stack import wait_for
from faults.fleet import BODIES, Fleet, ask
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


OTHER_PATHS = {
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"model": "m", "max_output_tokens": 5, "input": "hello"},
}


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_a_stream_of_another_kind_that_begins_with_an_error(fleet: Fleet, path: str) -> None:
    """Whatever an API calls its first event: there is another attempt, and if that fails, too, an honest status."""
    asked = {**OTHER_PATHS[path], "stream": True}
    first, _ = fleet.decodes
    first.fault(inference="fail")
    fleet.forget()
    while not any(record["fault"] for record in first.requests()):
        answer = fleet.client.post(path, json=asked)
        assert answer.status_code == 200
        assert not {"event: error", "event: response.failed"} & {*answer.text.splitlines()}
    for engine in fleet.decodes:
        engine.fault(inference="fail")
    refused = fleet.client.post(path, json=asked)
    fleet.settle()
    fleet.recover()

    assert refused.status_code == 502
    assert refused.json()["error"]["code"] == "decode_failed"


def test_a_server_that_is_lost_behind_an_early_200_is_counted(fleet: Fleet) -> None:
    """/generate begins before prefill is done, and the head is held; the repetition is on the record like others."""
    fleet.forget()
    (victim, _), before = fleet.decodes, _counted(fleet)
    for engine in fleet.prefills:
        engine.fault(inference={"kind": "slow", "seconds": 60})
    asked = []
    while not victim.requests():
        asked.append(fleet.threads.submit(ask, fleet.client, *BODIES.keys() & {"/generate"}, stream=True))
        wait_for(lambda: sum(len(each.requests()) for each in fleet.decodes) >= len(asked))
    wait_for(lambda: victim.requests()[0]["answer_status"] == 200)
    victim.fault(inference="refuse")
    fleet.recover_all_but(victim)

    assert {str(each.result()) for each in asked} == {"answer"}
    assert _counted(fleet) > before
    fleet.recover()
    fleet.settle()


def _counted(fleet: Fleet) -> float:
    lines = [line for line in fleet.service.metrics().splitlines() if line.startswith("dp_extproc_leg_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'leg="decode"' in line and 'retried="yes"' in line)
