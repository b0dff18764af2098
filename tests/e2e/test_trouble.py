"""One engine in trouble: the others are routed to as before, and the log says it once."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from e2e.stack import DECODE_RANKS, Stack, run_stack
from finite import assert_finite
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
        return str(self._shown()["state"])

    def failure(self) -> str | None:
        """Tell what is wrong with the engine at present."""
        found: str | None = self._shown()["failure"]
        return found

    def _shown(self) -> dict[str, Any]:
        endpoints: list[dict[str, Any]] = self._stack.service.loads()["endpoints"]
        return next(each for each in endpoints if each["url"] == self._engine.url)

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
        pattern = rf'dp_extproc_load_failures_total{{endpoint="{url}",kind="(\w+)",[^}}]*}} ([\d.]+)'
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


def _ranks(count: int, **numbers: object) -> str:
    told = {"num_used_tokens": 5, "num_running_reqs": 1, "timestamp": 1e9} | numbers
    return json.dumps(
        {"timestamp": "2026-09-10T12:00:00+00:00", "loads": [{"dp_rank": each, **told} for each in range(count)]}
    )


_ONE_TIMEOUT: dict[str, Any] = {"kind": "hang", "times": 1}
"""After one an engine is asked anew who it is."""
_SOME = [100.0, 100.0, 3e6, 0.0, 0.0, 100.0]


@pytest.mark.parametrize(
    ("role", "page", "text"),
    [
        pytest.param("decode", "loads", _ranks(2, decode_moments=[5e-324, 1, 1e6, 0, 0, 1]), id="steps"),
        pytest.param("decode", "loads", _ranks(2, decode_moments=[1.7e308, 1.7e308, 1e6, 0, 0, 1]), id="many-steps"),
        pytest.param("decode", "loads", _ranks(2, num_used_tokens=1 << 53), id="tokens"),
        pytest.param("decode", "loads", _ranks(2, gen_throughput=1.7e308), id="rate"),
        pytest.param("decode", "loads", _ranks(2, num_running_reqs=-5), id="negative"),
        pytest.param("prefill", "loads", _ranks(4, num_waiting_uncached_tokens=10**400), id="queue"),
        pytest.param(
            "prefill",
            "server_info",
            '{"dp_size": 4, "version": "0.5.23", "disaggregation_mode": "prefill", "enable_dp_attention": true, '
            f'"chunked_prefill_size": {10**400}}}',
            id="step-size",
        ),
    ],
)
def test_a_page_that_tells_what_cannot_be(fleet: Stack, role: str, page: str, text: str) -> None:
    """It is refused as other pages that cannot be used, said once, and nothing else is any different."""
    liar, well = engines_of(fleet, role)
    patient, healthy = Patient(fleet, liar), Patient(fleet, well)
    liar.fault(loads={"kind": "text", "text": _ranks(2 if role == "decode" else 4, decode_moments=_SOME)})
    wait_for(lambda: patient.state() == "fresh")
    liar.fault(**{page: {"kind": "text", "text": text}})
    if page == "server_info":
        liar.fault(loads=_ONE_TIMEOUT)
    wait_for(lambda: patient.failures("wrong_shape") >= 4)
    send(fleet)

    assert patient.warnings().count("wrong_shape") == 1
    assert healthy.warnings() == []
    assert_finite(fleet.service.metrics(), loopback.CLIENT.get(f"{fleet.service.admin_url}/loads").text)
    assert _task_failures(fleet) == 0
    liar.fault(server_info="ok", loads=_ONE_TIMEOUT)
    wait_for(lambda: patient.failure() is None)
    send(fleet)


def _task_failures(stack: Stack) -> float:
    counts = re.findall(r"^dp_extproc_task_failures_total\{.*\} (.*)$", stack.service.metrics(), re.MULTILINE)
    assert counts
    return sum(map(float, counts))


@pytest.mark.parametrize("trouble", ["server_info", "dp_size"])
def test_standing_trouble_forgives_no_failures(trouble: str) -> None:
    """A server that fails its requests is left alone, whatever else is wrong with it at every scrape.

    It is never stale: it would be left alone for that, and get no request that it could fail.
    """
    long = {"consecutive_failures": 2, "base_ejection_time": "10m", "max_ejection_time": "10m"}
    with run_stack(decodes=2, load={**QUICK, "stale_after": "10m"}, outlier_detection=long) as stack:
        sick = stack.decodes[0]
        patient = Patient(stack, sick)
        if trouble == "server_info":
            sick.fault(server_info="500", loads=_ONE_TIMEOUT)
            kind = "http_status"
        else:  # its load page shows another number of ranks, and nothing on them: who is busier would get no request
            empty = _ranks(DECODE_RANKS - 1, num_used_tokens=0, num_running_reqs=0)
            sick.fault(loads={"kind": "text", "text": empty})
            kind = "disagreement"
        wait_for(lambda: patient.failures(kind) >= 1)
        sick.fault(inference="500")
        ejected = f'dp_extproc_endpoint_ejected{{endpoint="{sick.url}",pool="*",role="decode"}} 1.0'

        def is_ejected() -> bool:
            send(stack, 4)
            return ejected in stack.service.metrics()

        wait_for(is_ejected, 30)
        seen = patient.failures(kind)
        sick.forget()
        wait_for(lambda: patient.failures(kind) >= seen + 10)
        send(stack)

        assert ejected in stack.service.metrics()
        assert sick.requests() == []
