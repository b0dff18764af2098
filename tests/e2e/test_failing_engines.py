"""While one engine fails, requests go to the others as before, and the log reports it once."""

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
"""A second: no page of a healthy engine may take longer, even on a slow machine."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Stack]:
    """Give two engines of each role, and samples that become stale quickly."""
    with run_stack(prefills=2, decodes=2, load=QUICK) as stack:
        yield stack


class Patient:
    """The failing engine, as the service's log and metrics show it from now on."""

    def __init__(self, stack: Stack, engine: EngineProcess) -> None:
        self._stack = stack
        self._engine = engine
        self._warned = self._warnings()
        self._failed = self._failures()

    def state(self) -> str:
        """Return the service's state of the engine."""
        return str(self._shown()["state"])

    def failure(self) -> str | None:
        """Return the current failure of the engine."""
        found: str | None = self._shown()["failure"]
        return found

    def _shown(self) -> dict[str, Any]:
        endpoints: list[dict[str, Any]] = self._stack.service.loads()["endpoints"]
        return next(each for each in endpoints if each["url"] == self._engine.url)

    def warnings(self) -> list[str]:
        """List the failure kinds of which the log has warned, in order."""
        return self._warnings()[len(self._warned) :]

    def failures(self, kind: str) -> int:
        """Count failed reads of a kind."""
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
    """Send requests, and expect a response to each."""
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
def test_an_engine_is_avoided_while_its_load_page_fails(fleet: Stack, role: str, fault: str, kind: str) -> None:
    """An engine whose load page hangs, is wrong or fails is avoided while the other serves; then it is used again."""
    failing, well = engines_of(fleet, role)
    patient, healthy = Patient(fleet, failing), Patient(fleet, well)
    failing.fault(loads=fault, metrics=fault)
    wait_for(lambda: patient.state() == "stale")
    fleet.forget()
    send(fleet)

    assert failing.requests() == []
    assert len(well.requests()) == 24
    wait_for(lambda: patient.failures(kind) >= 4)
    assert (patient.warnings(), healthy.warnings()) == ([kind], [])
    failing.fault(loads="ok", metrics="ok")
    wait_for(lambda: patient.state() == "fresh")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_dead_engine_is_avoided_until_it_restarts(fleet: Stack, role: str) -> None:
    """A dead engine is avoided as soon as a read was refused, and used again once it has restarted."""
    dead, well = engines_of(fleet, role)
    patient = Patient(fleet, dead)
    dead.stop()
    wait_for(lambda: patient.state() == "stale")
    well.forget()
    send(fleet)

    assert len(well.requests()) == 24
    wait_for(lambda: patient.failures("refused") >= 4)
    warnings = patient.warnings()
    # A page in transit when the engine died is a failure of another kind, and is logged once too.
    assert warnings[-1] == "refused"
    assert len(warnings) == len(set(warnings))
    dead.start()
    dead.wait_until_listening()
    wait_for(lambda: patient.state() == "fresh")
    send(fleet)
    assert dead.requests()


def test_a_stale_endpoint_is_used_if_it_is_the_only_one() -> None:
    """A stale sample is no reason to reject a request if there is no other endpoint."""
    with run_stack(load=QUICK) as stack:
        for engine in (*stack.prefills, *stack.decodes):
            engine.fault(loads="hang", metrics="hang")
        wait_for(lambda: all(each["state"] == "stale" for each in stack.service.loads()["endpoints"]))
        send(stack, 4)


def _ranks(count: int, **numbers: object) -> str:
    leaked = {"num_used_tokens": 5, "num_running_reqs": 1, "timestamp": 1e9} | numbers
    return json.dumps(
        {"timestamp": "2026-09-10T12:00:00+00:00", "loads": [{"dp_rank": each, **leaked} for each in range(count)]}
    )


_ONE_TIMEOUT: dict[str, Any] = {"kind": "hang", "times": 1}
"""After one timeout the service reads ``/server_info`` again."""
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
def test_a_page_with_impossible_values_is_rejected(fleet: Stack, role: str, page: str, text: str) -> None:
    """The page is rejected like other unusable pages and logged once, and nothing else changes."""
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


@pytest.mark.parametrize("failure", ["server_info", "dp_size"])
def test_an_ejection_stays_while_another_failure_lasts(failure: str) -> None:
    """An endpoint that fails its requests stays ejected, whatever else fails at every read.

    Its sample is never stale: a stale endpoint would be avoided for that, and get no request that it could fail.
    """
    long = {"consecutive_failures": 2, "base_ejection_time": "10m", "max_ejection_time": "10m"}
    with run_stack(decodes=2, load={**QUICK, "stale_after": "10m"}, outlier_detection=long) as stack:
        failing = stack.decodes[0]
        patient = Patient(stack, failing)
        if failure == "server_info":
            failing.fault(server_info="500", loads=_ONE_TIMEOUT)
            kind = "http_status"
        else:  # its load page has another number of ranks without load, because a busier engine would get no request
            empty = _ranks(DECODE_RANKS - 1, num_used_tokens=0, num_running_reqs=0)
            failing.fault(loads={"kind": "text", "text": empty})
            kind = "disagreement"
        wait_for(lambda: patient.failures(kind) >= 1)
        failing.fault(inference="500")
        ejected = f'dp_extproc_endpoint_ejected{{endpoint="{failing.url}",pool="*",role="decode"}} 1.0'

        def is_ejected() -> bool:
            send(stack, 4)
            return ejected in stack.service.metrics()

        wait_for(is_ejected, 30)
        seen = patient.failures(kind)
        failing.forget()
        wait_for(lambda: patient.failures(kind) >= seen + 10)
        send(stack)

        assert ejected in stack.service.metrics()
        assert failing.requests() == []
