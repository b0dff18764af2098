"""Two replicas of two workers each behind one Envoy: legs report to the one process of four that has placed them."""

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from dp_extproc.envoy_config.addresses import SERVICE
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
        envoy={"truncated_streams": "reset"},  # with error_event a lost stream ends with an event the service sees
    ) as fleet:
        wait_for(lambda: all(len(ready(each)) == 2 for each in services(fleet)), PATIENT)
        wait_for(lambda: fleet.envoy.healthy(SERVICE) == 4, PATIENT)  # Envoy asks each whether it is ready in its turn
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.settle()
    running.forget()
    return running


def services(fleet: Fleet) -> Sequence[ServiceProcess]:
    return fleet.service, *fleet.others


def ready(service: ServiceProcess) -> list[int]:
    """Give the process ids of the workers that serve."""
    return [each["pid"] for each in service.loads().get("worker_processes", []) if each["ready"]]


def count(fleet: Fleet, metric: str, label: str = "") -> list[float]:
    """Add up a metric of every worker; if there is a label, what has it next to the worker's."""
    return [
        sum(float(line.rpartition(" ")[2]) for line in page if line.startswith(f'{metric}{{process="{worker}"{label}'))
        for page in [service.metrics().splitlines() for service in services(fleet)]
        for worker in range(2)
    ]


def test_every_leg_reports_to_its_owner(fleet: Fleet) -> None:
    """All four processes place requests, and none misses the leg of one."""
    asked = [fleet.threads.submit(ask, fleet.client, path, stream=True) for path in (CHAT, GENERATE) * 20]

    assert {str(each.result()) for each in asked} == {"answer"}
    assert all(count(fleet, "dp_extproc_picks_total"))
    assert sum(count(fleet, "dp_extproc_missing_prefill_legs_total")) == 0


def test_hostile_messages_do_no_harm(fleet: Fleet) -> None:
    """Somebody writes to the bus; all four processes count it, and every request is answered."""
    directory = Path(fleet.service.config.sync.directory or "") if fleet.service.config.sync else Path()
    sockets = list(directory.glob("*.sock"))
    before = [pid for each in services(fleet) for pid in ready(each)]
    pool = str(fleet.endpoints()[0]["pool"])
    told = PlacementRecord(pool, RequestCost(900.0), fleet.decodes[0].url, 0, fleet.prefills[0].url, 0)
    hostile = hostile_messages(told)
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


def test_a_leg_that_fails_ends_the_other_one(fleet: Fleet) -> None:
    """Wherever it was placed: decode is told at once, and does not wait for what will never come."""
    for engine in fleet.prefills:
        engine.fault(inference="500")
    asked = [fleet.threads.submit(ask, fleet.client, GENERATE, stream=False) for _ in range(CLIENTS)]

    assert {str(each.result()) for each in asked} == {"502 prefill_failed"}
    fleet.settle()  # engines that work again would end them, too
    fleet.recover()
    legs = [record for engine in fleet.decodes for record in engine.requests()]
    assert len(legs) >= CLIENTS
    assert {(record["outcome"], record["error"]) for record in legs} == {("aborted", "client disconnected")}


def test_a_client_that_leaves_ends_both_legs(fleet: Fleet) -> None:
    """Wherever it was placed."""
    for engine in fleet.engines:
        engine.fault(inference="hang")
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            fleet.client.post(GENERATE, json=BODIES[GENERATE], timeout=0.5)
    fleet.settle()
    fleet.recover()

    assert all(record["disconnected_at"] for engine in fleet.engines for record in engine.requests())


def test_a_server_that_is_lost_behind_an_early_200(fleet: Fleet) -> None:
    """Envoy asks nobody before it repeats such a request; whoever gets it then counts what has happened."""
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


def test_a_server_that_is_lost_after_who_has_sent_to_it(fleet: Fleet) -> None:
    """Envoy repeats what it has no answer to, without being told; whoever gets it then counts what has happened."""
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
    assert sum(map(failures_at, services(fleet))) - before == hit  # those that were killed count from 0 again
    wait_for(lambda: fleet.envoy.healthy(SERVICE) == 4, PATIENT)
    fleet.wait_until_fresh()


def sent(engines: Sequence[EngineProcess]) -> list[dict[str, Any]]:
    """Give the requests that engines have."""
    return [record for engine in engines for record in engine.requests()]


def failures_at(service: ServiceProcess) -> float:
    """Add up the failures of decode that a replica has counted."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("dp_extproc_leg_failures_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'leg="decode"' in line)


def log(fleet: Fleet) -> list[dict[str, Any]]:
    return [line for line in fleet.envoy.access_log() if line["leg"] == "main" and line["status"] != 200]


def test_a_decode_server_that_dies(fleet: Fleet) -> None:
    """No request is lost that has not received a token, and nobody counts twice what others placed."""
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


def test_a_worker_that_is_killed_costs_no_request(fleet: Fleet) -> None:
    """The other three take what comes."""
    victim = ready(fleet.service)[0]

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(ready(fleet.service)) == 2 and victim not in ready(fleet.service), PATIENT)

    load = under_load(fleet.envoy.url, kill)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}


def test_replicas_that_are_restarted_one_by_one_cost_no_request(fleet: Fleet) -> None:
    """SIGTERM to each, which drains and ends, and is started again when it has."""

    def restart() -> None:
        for service in services(fleet):
            assert service.stop() == 0
            service.start()
            service.wait_until_listening()
            wait_for(lambda service=service: len(ready(service)) == 2, PATIENT)  # type: ignore[misc]

    load = under_load(fleet.envoy.url, restart)

    assert load.statuses.keys() == {200}
    assert load.ends == {"data: [DONE]": STREAMS}
