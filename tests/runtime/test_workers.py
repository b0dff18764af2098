"""Several worker processes behind one admin port: start, restart, stop, and common pages."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dp_extproc.background import Guard
from dp_extproc.cli.start import with_processes
from dp_extproc.config import ConfigFile, parse_config
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.observability.merged_metrics import merge_pages
from dp_extproc.runtime.reload import Reloader
from dp_extproc.runtime.worker_context import WorkerContext, worker_config
from dp_extproc.runtime.workers import _Pages, _Worker, pause_before
from patience import wait_for

CONFIG = "pools:\n- models: ['*']\n  workers: {endpoints: [http://127.0.0.1:1]}\n"


def pools() -> list[dict[str, Any]]:
    """Return a pool of engines that do not run."""
    return [{"models": ["*"], "workers": {"endpoints": [f"http://127.0.0.1:{free_port()}"]}}]


def workers_of(service: ServiceProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.loads()["worker_processes"]
    return found


def is_alive(service: ServiceProcess, worker: int) -> bool:
    """Ask one worker on its own gRPC port."""
    with grpc.insecure_channel(str(service.config.listen.grpc.shifted(worker))) as channel:
        request = health_pb2.HealthCheckRequest(service="liveness")
        with contextlib.suppress(grpc.RpcError):
            return bool(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status == 1)
    return False


def has_peer(service: ServiceProcess) -> bool:
    page = service.loads()
    return "sync" in page and [peer["age"] < 1 for peer in page["sync"]["peers"]] == [True]


def test_pages_leave_out_a_worker_process_that_responds_with_an_error(tmp_path: Path) -> None:
    """The pages of the others would be lost with it."""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.host == "worker-0":
            return httpx.Response(500, text="unexpected error")
        metrics = "# TYPE dp_extproc_streams gauge\ndp_extproc_streams 3.0\n"
        return httpx.Response(200, text='{"endpoints": []}' if request.url.path == "/loads" else metrics)

    async def read() -> tuple[dict[str, Any], bytes]:
        workers = [_Worker(index, tmp_path, "info") for index in range(2)]
        for worker in workers:
            worker._client = httpx.AsyncClient(
                transport=httpx.MockTransport(respond), base_url=f"http://worker-{worker.index}"
            )
        config, text = parse_config(CONFIG), CONFIG
        pages = _Pages(workers, Reloader(ConfigFile(tmp_path / "config.yaml"), text, config, lambda *_: None), Guard())
        return await pages.loads(), await pages.metrics()

    loads, metrics = asyncio.run(read())

    assert loads["endpoints"] == []
    assert [each["ready"] for each in loads["worker_processes"]] == [False, True]
    assert b'dp_extproc_streams{process="1"} 3.0' in metrics


@pytest.fixture(scope="module")
def pair() -> Iterator[ServiceProcess]:
    """Two workers none of whose engines is up."""
    with ServiceProcess(write_config(pools(), listen={"workers": 2})) as service:
        wait_for(lambda: has_peer(service), 20)
        yield service


def test_worker_processes_have_ports_of_their_own(pair: ServiceProcess) -> None:
    """They listen side by side, from listen.grpc on."""
    assert [is_alive(pair, worker) for worker in range(2)] == [True, True]
    assert len({each["pid"] for each in workers_of(pair)} - {pair.pid}) == 2


def test_worker_processes_share_a_bus_without_configuration(pair: ServiceProcess) -> None:
    """The bus is in a directory that other users cannot read."""
    sync = pair.loads()["sync"]

    assert pair.config.sync is None
    assert sync["connected"] is True
    assert len(sync["peers"]) == 1


def test_metrics_of_all_worker_processes_are_one_page(pair: ServiceProcess) -> None:
    """Every sample has the label of its process, and the parent adds its own metrics."""
    page = pair.metrics()

    assert 'dp_extproc_build_info{process="0",' in page
    assert 'dp_extproc_build_info{process="1",' in page
    assert "dp_extproc_worker_processes 2.0" in page
    assert 'dp_extproc_config_reloads_total{outcome="applied"} 0.0' in page
    assert page.count("# TYPE dp_extproc_build_info") == 1


def test_killed_worker_process_is_restarted_alone(pair: ServiceProcess) -> None:
    """The other one keeps its process id."""
    before = workers_of(pair)
    os.kill(before[1]["pid"], signal.SIGKILL)
    wait_for(lambda: workers_of(pair)[1]["restarts"] == 1 and is_alive(pair, 1), 20)
    after = workers_of(pair)

    assert after[0] == before[0]
    assert after[1]["pid"] not in {None, before[1]["pid"]}
    assert "worker 1 has ended with status -9; starting it again in 0.1 s" in pair.log()
    assert re.search(r'dp_extproc_worker_process_restarts_total{process="1"} 1.0', pair.metrics())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_all_worker_processes_with_status_0(number: signal.Signals) -> None:
    """The parent waits for them, and leaves none behind."""
    with ServiceProcess(write_config(pools(), listen={"workers": 2})) as service:
        wait_for(lambda: has_peer(service), 20)
        pids = [each["pid"] for each in workers_of(service)]
        assert service.stop(number) == 0
        assert service.log().count("stopping: not ready from now on") == 2
        assert "Traceback" not in service.log()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_worker_processes_end_with_a_killed_parent() -> None:
    """No worker process runs without a parent."""
    with ServiceProcess(write_config(pools(), listen={"workers": 2})) as service:
        wait_for(lambda: has_peer(service), 20)
        pids = [each["pid"] for each in workers_of(service)]
        service.stop(signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)


def test_taken_ports_are_all_reported_at_once(tmp_path: Path) -> None:
    """One message has every port that another process uses."""
    content = write_config(pools(), listen={"workers": 3})
    config = parse_config(yaml.safe_dump(content))
    first, last, admin = config.listen.grpc, config.listen.grpc.shifted(2), config.listen.admin
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with contextlib.ExitStack() as taken:
        for address in (first, last, admin):
            taken.enter_context(socket.create_server((address.host, address.port)))
        argv = [sys.executable, "-m", "dp_extproc", "serve", "-c", str(path)]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"cannot listen on {address} ({key}): is another process using the port?"
        for address, key in ((first, "listen.grpc"), (last, "listen.grpc"), (admin, "listen.admin"))
    ]


def test_processes_option_overrides_the_file() -> None:
    """The number follows the same rules as in the file, and Envoy has to have the same number."""
    warnings: list[str] = []
    listen = parse_config(yaml.safe_dump(write_config(pools()))).listen

    assert with_processes(listen, 4, warnings.append).workers == 4
    assert with_processes(listen, None, warnings.append) is listen
    (warning,) = warnings
    assert warning.startswith("--processes 4 wins over listen.workers: 1; write it into the file, too")
    with pytest.raises(Exception, match="less than or equal to 256"):
        with_processes(listen, 1000, warnings.append)


def test_worker_process_advertises_its_own_address() -> None:
    """Envoy reaches the process that scheduled a request at this address."""
    listen = {"grpc": "0.0.0.0:7000", "advertise": "10.0.0.1:8000", "workers": 3}
    config = parse_config(yaml.safe_dump(write_config(pools(), listen=listen)))
    found = worker_config(config, WorkerContext(2, 0, Path("/run/x")))

    assert str(found.listen.grpc) == "0.0.0.0:7002"
    assert str(found.listen.advertise) == "10.0.0.1:8002"
    assert found.sync is not None
    assert found.sync.directory == "/run/x/bus"


def test_worker_processes_use_the_bus_of_the_file() -> None:
    """With replicas on several hosts all worker processes of all hosts share it."""
    config = parse_config(yaml.safe_dump(write_config(pools(), sync={"url": "redis://10.0.0.7:6379"})))

    assert worker_config(config, WorkerContext(1, 0, Path("/run/x"))).sync is config.sync


def test_pauses_between_restarts_grow_up_to_a_bound() -> None:
    """A process that ends at once, again and again, does not occupy the machine."""
    assert [pause_before(ends) for ends in (1, 2, 3, 7, 8, 10_000)] == [0.1, 0.2, 0.4, 6.4, 10.0, 10.0]


def test_pages_are_merged_family_by_family() -> None:
    """Comments occur once, and labels and values stay as they are."""
    first = '# HELP a_total A {b} c\n# TYPE a_total counter\na_total 1.0\n# TYPE b gauge\nb{x="{ }"} 2.0\n'
    second = "# HELP a_total A {b} c\n# TYPE a_total counter\na_total 5.0\n# TYPE b gauge\n"

    assert merge_pages({"0": first, "1": second}) == (
        '# HELP a_total A {b} c\n# TYPE a_total counter\na_total{process="0"} 1.0\na_total{process="1"} 5.0\n'
        '# TYPE b gauge\nb{process="0",x="{ }"} 2.0\n'
    )


def test_readiness_is_that_of_any_worker_process(pair: ServiceProcess) -> None:
    """Without engines none is ready."""
    assert httpx.get(f"{pair.admin_url}/readyz").status_code == 503
    assert httpx.get(f"{pair.admin_url}/healthz").status_code == 200
