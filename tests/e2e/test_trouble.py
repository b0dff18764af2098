"""One engine in trouble: the others are routed to as before, and the log says it once."""

import re
from collections.abc import Iterator

import pytest

from dp_extproc.testbed.engine import EngineProcess
from e2e.stack import Stack, run_stack
from patience import wait_for

REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
QUICK = {"stale_after": "2s", "timeout": "1s"}
"""A second: no page of a healthy server may take longer, on however slow a machine."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Stack]:
    """Two servers of each role, and knowledge that grows old quickly."""
    with run_stack(prefills=2, decodes=2, load=QUICK) as stack:
        yield stack


class Patient:
    """The engine in trouble, seen through the service's log and metrics from now on."""

    def __init__(self, stack: Stack, engine: EngineProcess) -> None:
        self._stack = stack
        self._engine = engine
        self._warned = self._warnings()
        self._failed = self._failures()

    def state(self) -> str:
        """Tell how well the service knows the engine."""
        endpoints = self._stack.service.loads()["endpoints"]
        return next(str(each["state"]) for each in endpoints if each["url"] == self._engine.url)

    def warnings(self) -> list[str]:
        """Tell of what kinds of trouble the log has warned, in order."""
        return self._warnings()[len(self._warned) :]

    def failures(self, kind: str) -> int:
        """Count failed scrapes of a kind."""
        return self._failures().get(kind, 0) - self._failed.get(kind, 0)

    def _warnings(self) -> list[str]:
        lines = self._stack.service.log().splitlines()
        about = [line.partition(f"{self._engine.url}: ") for line in lines if "WARNING" in line]
        return [message.partition(":")[0] for _, named, message in about if named]

    def _failures(self) -> dict[str, int]:
        url = re.escape(self._engine.url)
        pattern = rf'dp_extproc_scrape_failures_total{{endpoint="{url}",kind="(\w+)",[^}}]*}} ([\d.]+)'
        found = re.findall(pattern, self._stack.service.metrics())
        return {kind: int(float(count)) for kind, count in found}


def send(stack: Stack, count: int = 24) -> None:
    """Send requests and expect every one to be answered."""
    answers = [stack.client.post("/generate", json=REQUEST).status_code for _ in range(count)]
    assert answers == [200] * count


def engines_of(stack: Stack, role: str) -> tuple[EngineProcess, EngineProcess]:
    first, second = stack.prefills if role == "prefill" else stack.decodes
    return first, second


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
    sick, well = engines_of(fleet, role)
    patient, healthy = Patient(fleet, sick), Patient(fleet, well)
    sick.fault(loads=fault, metrics=fault)
    wait_for(lambda: patient.state() == "stale")
    fleet.forget()
    send(fleet)

    assert sick.requests() == []
    assert len(well.requests()) == 24
    wait_for(lambda: patient.failures(kind) >= 4)
    assert (patient.warnings(), healthy.warnings()) == ([kind], [])
    sick.fault(loads="ok", metrics="ok")
    wait_for(lambda: patient.state() == "fresh")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_server_that_is_down(fleet: Stack, role: str) -> None:
    """A dead server is avoided as soon as a scrape was refused, and used again once it is back."""
    dead, well = engines_of(fleet, role)
    patient = Patient(fleet, dead)
    dead.stop()
    wait_for(lambda: patient.state() == "stale")
    well.forget()
    send(fleet)

    assert len(well.requests()) == 24
    wait_for(lambda: patient.failures("refused") >= 4)
    warnings = patient.warnings()
    # A page that was under way when the server went is trouble of another kind, and is said once, too.
    assert warnings[-1] == "refused"
    assert len(warnings) == len(set(warnings))
    dead.start()
    dead.wait_until_listening()
    wait_for(lambda: patient.state() == "fresh")
    send(fleet)
    assert dead.requests()


def test_a_lone_stale_server_is_still_used() -> None:
    """Old knowledge is no reason to refuse when there is nobody else."""
    with run_stack(load=QUICK) as stack:
        for engine in (*stack.prefills, *stack.decodes):
            engine.fault(loads="hang", metrics="hang")
        wait_for(lambda: all(each["state"] == "stale" for each in stack.service.loads()["endpoints"]))
        send(stack, 4)
