"""The service as a process: its start, its pages, its end."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dp_extproc.config import ConfigFile, parse_config
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime.process import serve
from dp_extproc.runtime.sockets import StartError, owner_address

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"


def pools() -> list[dict[str, Any]]:
    """Return a pool of engines that do not run."""
    prefill, decode = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    return [{"models": ["*"], "prefill": {"endpoints": [prefill]}, "decode": {"endpoints": [decode]}}]


@pytest.fixture(scope="module")
def lonely() -> Iterator[ServiceProcess]:
    """A service none of whose engines is up."""
    with ServiceProcess(write_config(pools())) as service:
        yield service


def health_of(service: ServiceProcess, name: str) -> str:
    with grpc.insecure_channel(str(service.config.listen.grpc)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5, wait_for_ready=True)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_service_is_alive_but_not_ready_without_engines(lonely: ServiceProcess) -> None:
    """HTTP and gRPC probes agree."""
    assert httpx.get(f"{lonely.admin_url}/healthz").status_code == 200
    assert httpx.get(f"{lonely.admin_url}/readyz").status_code == 503
    assert health_of(lonely, "liveness") == "SERVING"
    assert [health_of(lonely, name) for name in ("", "readiness", EXT_PROC)] == ["NOT_SERVING"] * 3


def test_loads_lists_engines_that_never_responded(lonely: ServiceProcess) -> None:
    """Every configured endpoint is listed with its failure."""
    deadline = time.monotonic() + 10
    while any(each["failure"] is None for each in lonely.loads()["endpoints"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    endpoints = lonely.loads()["endpoints"]
    assert [each["role"] for each in endpoints] == ["prefill", "decode"]
    assert {each["state"] for each in endpoints} == {"undiscovered"}
    assert all(each["failure"].startswith("refused: no connection to ") for each in endpoints)


def test_loads_and_metrics_have_no_exchange_without_sync(lonely: ServiceProcess) -> None:
    """A service without replicas shows and counts none."""
    assert lonely.loads()["sync"] is None
    assert "dp_extproc_sync" not in lonely.metrics()


@pytest.mark.parametrize(
    "name",
    [
        "dp_extproc_build_info",
        "dp_extproc_requests_total",
        "dp_extproc_decision_duration_seconds_bucket",
        "dp_extproc_active_streams",
        "dp_extproc_endpoint_state",
        "dp_extproc_load_updates_total",
        "dp_extproc_prompt_bytes_per_token",
    ],
)
def test_metrics_exist_from_the_start(lonely: ServiceProcess, name: str) -> None:
    """A dashboard has values before the first request."""
    assert re.search(rf"^{name}[{{ ]", lonely.metrics(), re.MULTILINE)


def test_start_logs_the_addresses(lonely: ServiceProcess) -> None:
    """One line has both addresses."""
    assert f"ext_proc on {lonely.config.listen.grpc}, admin on {lonely.config.listen.admin}" in lonely.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_service_with_status_0(number: signal.Signals) -> None:
    """The service stops in good order."""
    with ServiceProcess(write_config(pools())) as service:
        assert service.stop(number) == 0
        assert "Traceback" not in service.log()


def test_service_is_alive_but_not_ready_while_draining() -> None:
    """After SIGTERM it continues to work; a second signal ends it at once."""
    with ServiceProcess({**write_config(pools()), "drain": "1h"}) as service:
        service.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while "stopping" not in service.log():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert httpx.get(f"{service.admin_url}/healthz").status_code == 200
        assert httpx.get(f"{service.admin_url}/readyz").status_code == 503
        assert health_of(service, "liveness") == "SERVING"

        assert service.stop() == 0


def _serve(path: Path, content: object) -> subprocess.CompletedProcess[str]:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    argv = [sys.executable, "-m", "dp_extproc", "serve", "-c", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("listener", ["grpc", "admin"])
def test_taken_port_is_reported(tmp_path: Path, listener: str) -> None:
    """The service does not start on half of its ports."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = _serve(tmp_path / "config.yaml", write_config(pools(), listen={listener: address}))

    assert result.returncode == 1
    assert f"cannot listen on {address} (listen.{listener})" in result.stderr
    assert "Traceback" not in result.stderr


def test_port_taken_after_the_check_is_reported(tmp_path: Path) -> None:
    """Another process may take a port between the check and the start."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = yaml.safe_dump(write_config(pools(), listen={"grpc": address}))
        with pytest.raises(StartError, match=r"cannot listen on .* \(listen\.grpc\)"):
            asyncio.run(serve(parse_config(text), text, ConfigFile(tmp_path / "config.yaml")))


def test_invalid_file_is_reported_before_the_start(tmp_path: Path) -> None:
    """The status is 2, with every mistake at once."""
    result = _serve(tmp_path / "config.yaml", {"load": {"interval": 1}, "pools": [{"models": ["*"]}]})

    assert result.returncode == 2
    assert "load.interval" in result.stderr
    assert "pools[0]" in result.stderr


class TestOwnerAddress:
    """Where the prefill legs of this process report to."""

    def _owner(self, **listen: str) -> str:
        return owner_address(parse_config(yaml.safe_dump({"listen": listen, "pools": pools()})))

    def test_owner_is_the_listen_address(self) -> None:
        """An address that is no wildcard is reached as it is."""
        assert self._owner(grpc="127.0.0.1:7001") == "127.0.0.1:7001"

    def test_owner_is_the_advertised_address(self) -> None:
        """The setting of the operator overrides the rest."""
        assert self._owner(grpc="0.0.0.0:7001", advertise="10.1.2.3:7002") == "10.1.2.3:7002"

    def test_owner_is_the_host_address_of_a_wildcard(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host name resolves to an address that others reach."""
        monkeypatch.setattr(socket, "gethostbyname", lambda _name: "10.9.8.7")

        assert self._owner(grpc="0.0.0.0:7001") == "10.9.8.7:7001"

    def test_owner_is_an_error_without_host_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It cannot be guessed, so the error names the key."""

        def fail(_name: str) -> str:
            raise OSError("Name or service not known")

        monkeypatch.setattr(socket, "gethostbyname", fail)
        with pytest.raises(StartError, match=r"listen\.advertise"):
            self._owner(grpc="0.0.0.0:7001")
