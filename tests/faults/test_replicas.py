"""With two replicas of two worker processes each, legs report to the one process of four that scheduled them."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.service import ServiceProcess
from dp_extproc.load.records import PlacementRecord, RequestCost
from e2e.load import PATIENT, STREAMS, under_load
from e2e.stack import PATIENCE
from faults.fleet import BODIES, Fleet, ask, run_fleet
from finite import assert_finite
from patience import wait_for
from sync.hostile import hostile_messages

CHAT, GENERATE = BODIES
LONG: dict[str, Any] = {"sampling_params": {"max_new_tokens": 100}}
VERY_LONG: dict[str, dict[str, Any]] = {
    CHAT: {"max_tokens": 300},
    GENERATE: {"sampling_params": {"max_new_tokens": 300}},
}
CLIENTS = 24


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    bus = f"unix://{tmp_path_factory.mktemp('bus')}"
    load = {"interval": "500ms", "stale_after": "20s", "timeout": "5s"}
    options = ("--time-scale", "1", *PATIENCE)
    with run_fleet(
        options,
        replicas=2,
        listen={"workers": 2},
        sync={"url": bus},
        load=load,
        drain="2500ms",
        # otherwise a truncated stream ends with an event that the service sees immediately
        envoy={"truncated_streams": "reset"},
    ) as fleet:
        wait_for(lambda: all(len(ready(each)) == 2 for each in services(fleet)), PATIENT)
        wait_for(lambda: fleet.envoy.healthy("extproc") == 4, PATIENT)  # Envoy checks the health of each in its turn
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.settle()
    running.forget()
    return running


def services(fleet: Fleet) -> Sequence[ServiceProcess]:
    return fleet.service, *fleet.others


def ready(service: ServiceProcess) -> list[int]:
    """List the process ids of the worker processes that serve."""
    return [each["pid"] for each in service.loads().get("worker_processes", []) if each["ready"]]


def count(fleet: Fleet, metric: str, label: str = "") -> list[float]:
    """Sum a metric over all worker processes, with *label* beside the label of the process if one is given."""
    return [
        sum(float(line.rpartition(" ")[2]) for line in page if line.startswith(f'{metric}{{process="{worker}"{label}'))
        for page in [service.metrics().splitlines() for service in services(fleet)]
        for worker in range(2)
    ]


def test_every_leg_reports_to_its_owner(fleet: Fleet) -> None:
    """All four processes schedule requests, and none misses one of its legs."""
    asked = [fleet.threads.submit(ask, fleet.client, path, stream=True) for path in (CHAT, GENERATE) * 20]

    assert {str(each.result()) for each in asked} == {"answer"}
    assert all(count(fleet, "dp_extproc_picks_total"))
    assert sum(count(fleet, "dp_extproc_missing_prefill_legs_total")) == 0


def test_hostile_messages_are_counted_and_ignored(fleet: Fleet) -> None:
    """Another program writes to the bus; all four processes count it, and every request is answered."""
    directory = Path(fleet.service.config.sync.directory or "") if fleet.service.config.sync else Path()
    sockets = list(directory.glob("*.sock"))
    before = [pid for each in services(fleet) for pid in ready(each)]
    pool = str(fleet.endpoints()[0]["pool"])
    leaked = PlacementRecord(pool, RequestCost(900.0), fleet.decodes[0].url, 0, fleet.prefills[0].url, 0)
    hostile = hostile_messages(leaked)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        for path in sockets:
            for message in hostile:
                stranger.sendto(message, str(path))
    wait_for(lambda: count(fleet, "dp_extproc_sync_anomalies_total", ',kind="undecodable"') == [len(hostile)] * 4)
    asked = [fleet.threads.submit(ask, fleet.client, path, stream=True) for path in (CHAT, GENERATE) * 20]

    assert {str(each.result()) for each in asked} == {"answer"}
    assert len(sockets) == 4
    assert [pid for each in services(fleet) for pid in ready(each)] == before
    for service in services(fleet):
        assert_finite(service.metrics(), loopback.CLIENT.get(f"{service.admin_url}/loads").text)
    assert sum(count(fleet, "dp_extproc_task_failures_total")) == 0


def test_a_failed_leg_ends_the_other_leg(fleet: Fleet) -> None:
    """Whichever process scheduled it, decode ends immediately instead of waiting for its peer."""
    for engine in fleet.prefills:
        engine.fault(inference="500")
    asked = [fleet.threads.submit(ask, fleet.client, GENERATE, stream=False) for _ in range(CLIENTS)]

    assert {str(each.result()) for each in asked} == {"502 prefill_failed"}
    fleet.settle()  # working engines would end them too
    fleet.recover()
    legs = [record for engine in fleet.decodes for record in engine.requests()]
    assert len(legs) >= CLIENTS
    assert {(record["outcome"], record["error"]) for record in legs} == {("aborted", "client disconnected")}


def test_a_disconnect_ends_both_legs(fleet: Fleet) -> None:
    """Whichever process scheduled the request, a disconnect ends both of its legs."""
    for engine in fleet.engines:
        engine.fault(inference="hang")
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            fleet.client.post(GENERATE, json=BODIES[GENERATE], timeout=0.5)
    fleet.settle()
    fleet.recover()

    assert all(record["disconnected_at"] for engine in fleet.engines for record in engine.requests())


def test_a_failure_is_counted_if_an_engine_dies_behind_an_early_200(fleet: Fleet) -> None:
    """Envoy retries such a request by itself, and the process that gets it then counts the failure."""
    victim, before = fleet.decodes[0], sum(count(fleet, "dp_extproc_leg_failures_total"))
    for engine in fleet.prefills:
        engine.fault(inference={"kind": "slow", "seconds": 60})
    asked = []
    while not victim.requests():
        asked.append(fleet.threads.submit(ask, fleet.client, GENERATE, stream=True))
        wait_for(lambda: sum(len(each.requests()) for each in fleet.decodes) >= len(asked))
    wait_for(lambda: victim.requests()[0]["answer_status"] == 200)
    victim.stop(signal.SIGKILL)
    fleet.recover_all_but(victim)

    assert {str(each.result()) for each in asked} == {"answer"}
    assert sum(count(fleet, "dp_extproc_leg_failures_total")) == before + 1
    assert any("upstream_reset_after_response_started" in line["response_code_details"] for line in log(fleet))
    victim.start()
    victim.wait_until_listening()
    fleet.wait_until_fresh()


def test_a_failure_is_counted_if_the_scheduling_process_died_before(fleet: Fleet) -> None:
    """Envoy retries an unanswered request by itself, and the process that gets it then counts the failure."""
    victim, other = fleet.decodes[0], fleet.others[0]
    asked = [
        fleet.threads.submit(ask, fleet.client, path, stream=False, **VERY_LONG[path])
        for path in (CHAT, GENERATE) * (CLIENTS // 2)
    ]
    wait_for(lambda: [bool(each["first_token_at"]) for each in sent(fleet.decodes)] == [True] * CLIENTS)
    hit, before = len(sent([victim])), failures_at(other)
    for worker in ready(fleet.service):
        os.kill(worker, signal.SIGKILL)
    victim.stop(signal.SIGKILL)
    outcomes = [str(each.result()) for each in asked]
    victim.start()
    victim.wait_until_listening()
    wait_for(lambda: len(ready(fleet.service)) == 2, PATIENT)

    assert set(outcomes) == {"answer"}
    assert sum(map(failures_at, services(fleet))) - before == hit  # the counters of killed processes start again at 0
    wait_for(lambda: fleet.envoy.healthy("extproc") == 4, PATIENT)
    fleet.wait_until_fresh()


def sent(engines: Sequence[EngineProcess]) -> list[dict[str, Any]]:
    """List the requests that engines have."""
    return [record for engine in engines for record in engine.requests()]


def failures_at(service: ServiceProcess) -> float:
    """Sum the decode failures that a replica has counted."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("dp_extproc_leg_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'leg="decode"' in line)


def log(fleet: Fleet) -> list[dict[str, Any]]:
    return [line for line in fleet.envoy.access_log() if line["leg"] == "main" and line["status"] != 200]


def test_no_request_fails_when_a_decode_engine_dies(fleet: Fleet) -> None:
    """No request without a token is lost, and each failure is counted by one replica."""
    victim = fleet.decodes[0]
    asked = [
        fleet.threads.submit(ask, fleet.client, GENERATE, stream=stream, **LONG)
        for stream in (False, True) * (CLIENTS // 2)
    ]
    wait_for(lambda: len(victim.requests()) > 2)
    victim.stop(signal.SIGKILL)
    outcomes = [each.result() for each in asked]
    victim.start()
    victim.wait_until_listening()

    assert [str(outcome) for outcome in outcomes if outcome.is_lost] == []
    fleet.wait_until_fresh()


def test_no_request_fails_when_a_worker_process_is_killed(fleet: Fleet) -> None:
    """The other three processes schedule the requests."""
    victim = ready(fleet.service)[0]

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(ready(fleet.service)) == 2 and victim not in ready(fleet.service), PATIENT)

    load = under_load(fleet.envoy.url, kill)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}


def test_no_request_fails_when_replicas_restart_one_by_one(fleet: Fleet) -> None:
    """Each drains and ends after SIGTERM, and is started again when it has ended."""

    def restart() -> None:
        for service in services(fleet):
            assert service.stop() == 0
            service.start()
            service.wait_until_listening()
            wait_for(lambda service=service: len(ready(service)) == 2, PATIENT)  # type: ignore[misc]

    load = under_load(fleet.envoy.url, restart)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
