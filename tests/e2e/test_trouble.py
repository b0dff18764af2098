"""One engine in trouble: the others are routed to as before, and the log says it once."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from dp_extproc.testbed.engine import EngineProcess
from e2e.stack import Stack, run_stack, wait_for

REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


@pytest.fixture
def fleet() -> Iterator[Stack]:
    """Two servers of each role, and knowledge that grows old quickly."""
    with run_stack(prefills=2, decodes=2, load={"stale_after": "500ms", "timeout": "300ms"}) as stack:
        yield stack


def state_of(stack: Stack, engine: EngineProcess) -> str:
    return next(str(each["state"]) for each in stack.service.loads()["endpoints"] if each["url"] == engine.url)


def warnings_about(stack: Stack, engine: EngineProcess) -> list[str]:
    return [line for line in stack.service.log().splitlines() if "WARNING" in line and engine.url in line]


def send(stack: Stack, count: int = 24) -> None:
    """Send requests and expect every one to be answered."""
    stack_answers = [stack.client.post("/generate", json=REQUEST).status_code for _ in range(count)]
    assert stack_answers == [200] * count


def failures(stack: Stack, engine: EngineProcess) -> Counter[str]:
    """Failed scrapes of an engine by kind, as /metrics tells them."""
    pattern = rf'dp_extproc_scrape_failures_total{{endpoint="{re.escape(engine.url)}",kind="(\w+)",[^}}]*}} ([\d.]+)'
    return Counter({kind: int(float(count)) for kind, count in re.findall(pattern, stack.service.metrics())})


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param("hang", "timeout", id="hung"),
        pytest.param("garbage", "unreadable", id="rubbish"),
        pytest.param("500", "http_status", id="errors"),
    ],
)
def test_a_load_page_in_trouble(fleet: Stack, role: str, fault: str, kind: str) -> None:
    """A server whose load page hangs, lies or fails is avoided while the other serves; then it returns."""
    engines = fleet.prefills if role == "prefill" else fleet.decodes
    sick, well = engines
    sick.fault(loads=fault, metrics=fault)
    wait_for(lambda: state_of(fleet, sick) == "stale")
    fleet.forget()
    send(fleet)

    assert sick.requests() == []
    assert len(well.requests()) == 24
    wait_for(lambda: failures(fleet, sick)[kind] >= 4)
    assert len(warnings_about(fleet, sick)) == 1
    assert warnings_about(fleet, well) == []
    sick.fault(loads="ok", metrics="ok")
    wait_for(lambda: state_of(fleet, sick) == "fresh")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_server_that_is_down(fleet: Stack, role: str) -> None:
    """A dead server is avoided as soon as a scrape was refused, and used again once it is back."""
    engines = fleet.prefills if role == "prefill" else fleet.decodes
    dead, well = engines
    dead.stop()
    wait_for(lambda: state_of(fleet, dead) == "stale")
    well.forget()
    send(fleet)

    assert len(well.requests()) == 24
    wait_for(lambda: failures(fleet, dead)["refused"] >= 4)
    assert len(warnings_about(fleet, dead)) == 1
    dead.start()
    dead.wait_until_listening()
    wait_for(lambda: state_of(fleet, dead) == "fresh")
    send(fleet)
    assert dead.requests()


def test_a_lone_stale_server_is_still_used() -> None:
    """Old knowledge is no reason to refuse when there is nobody else."""
    with run_stack(load={"stale_after": "500ms", "timeout": "300ms"}) as stack:
        for engine in (*stack.prefills, *stack.decodes):
            engine.fault(loads="hang", metrics="hang")
        wait_for(lambda: all(each["state"] == "stale" for each in stack.service.loads()["endpoints"]))
        send(stack, 4)
