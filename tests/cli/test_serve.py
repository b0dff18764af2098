"""The service as a process starts, shows its state, and ends as documented."""

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

from dp_extproc.config import parse_config
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime.process import serve
from dp_extproc.runtime.sockets import StartError, owner_address

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"


def pools() -> list[dict[str, Any]]:
    """Make a pool of engines that are not running."""
    prefill, decode = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    return [{"models": ["*"], "prefill": {"endpoints": [prefill]}, "decode": {"endpoints": [decode]}}]


@pytest.fixture(scope="module")
def lonely() -> Iterator[ServiceProcess]:
    """Give a service none of whose engines is running."""
    with ServiceProcess(write_config(pools())) as service:
        yield service


def health_of(service: ServiceProcess, name: str) -> str:
    with grpc.insecure_channel(str(service.config.listen.grpc)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5, wait_for_ready=True)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_the_service_is_alive_but_not_ready_without_engines(lonely: ServiceProcess) -> None:
    """HTTP and gRPC probes agree: alive, not ready."""
    assert httpx.get(f"{lonely.admin_url}/healthz").status_code == 200
    assert httpx.get(f"{lonely.admin_url}/readyz").status_code == 503
    assert health_of(lonely, "liveness") == "SERVING"
    assert [health_of(lonely, name) for name in ("", "readiness", EXT_PROC)] == ["NOT_SERVING"] * 3


def test_loads_list_engines_that_never_answered(lonely: ServiceProcess) -> None:
    """Every configured endpoint is listed with its failure."""
    deadline = time.monotonic() + 10
    while any(each["failure"] is None for each in lonely.loads()["endpoints"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    endpoints = lonely.loads()["endpoints"]
    assert [each["role"] for each in endpoints] == ["prefill", "decode"]
    assert {each["state"] for each in endpoints} == {"undiscovered"}
    assert all(each["failure"].startswith("refused: no connection to ") for each in endpoints)


def test_the_service_has_no_peers_without_the_section_sync(lonely: ServiceProcess) -> None:
    """A service without ``sync`` neither shows nor counts other replicas."""
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
    """A dashboard has data before the first request."""
    assert re.search(rf"^{name}[{{ ]", lonely.metrics(), re.MULTILINE)


def test_the_service_logs_its_address_at_the_start(lonely: ServiceProcess) -> None:
    """One line names the address where the service listens."""
    assert f"ext_proc on {lonely.config.listen.grpc}, admin on {lonely.config.listen.admin}" in lonely.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_ends_with_status_0_on_a_signal(number: signal.Signals) -> None:
    """The service ends by itself, with status 0."""
    with ServiceProcess(write_config(pools())) as service:
        assert service.stop(number) == 0
        assert "Traceback" not in service.log()


def test_the_service_is_alive_but_not_ready_while_it_drains() -> None:
    """After SIGTERM the service answers, alive and not ready, until a second signal ends the drain."""
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
def test_a_used_port_is_reported_before_the_start(tmp_path: Path, listener: str) -> None:
    """The service does not start on a part of its ports, and names the one that is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = _serve(tmp_path / "config.yaml", write_config(pools(), listen={listener: address}))

    assert result.returncode == 1
    assert f"cannot listen on {address} (listen.{listener})" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_used_port_is_reported_when_it_is_taken_later(tmp_path: Path) -> None:
    """Another program may take a port between the check of the ports and listening on them."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = yaml.safe_dump(write_config(pools(), listen={"grpc": address}))
        with pytest.raises(StartError, match=r"cannot listen on .* \(listen\.grpc\)"):
            asyncio.run(serve(parse_config(text), text, tmp_path / "config.yaml"))


def test_an_invalid_file_is_reported_before_anything_starts(tmp_path: Path) -> None:
    """The status is 2, and every mistake is listed at once."""
    result = _serve(tmp_path / "config.yaml", {"load": {"interval": 1}, "pools": [{"models": ["*"]}]})

    assert result.returncode == 2
    assert "load.interval" in result.stderr
    assert "pools[0]" in result.stderr


class TestOwnerAddress:
    """The address where the prefill legs of this process report."""

    def _owner(self, **listen: str) -> str:
        return owner_address(parse_config(yaml.safe_dump({"listen": listen, "pools": pools()})))

    def test_the_owner_address_is_the_one_listened_on(self) -> None:
        """A specific address is where the process is reached."""
        assert self._owner(grpc="127.0.0.1:7001") == "127.0.0.1:7001"

    def test_the_owner_address_is_the_advertised_one(self) -> None:
        """The configured address takes precedence."""
        assert self._owner(grpc="0.0.0.0:7001", advertise="10.1.2.3:7002") == "10.1.2.3:7002"

    def test_the_owner_address_is_this_host_on_all_interfaces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The name of the host leads to an address that other machines reach."""
        monkeypatch.setattr(socket, "gethostbyname", lambda _name: "10.9.8.7")

        assert self._owner(grpc="0.0.0.0:7001") == "10.9.8.7:7001"

    def test_the_owner_address_must_be_configured_if_unresolvable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The address cannot be guessed, so the error names the key."""

        def fail(_name: str) -> str:
            raise OSError("Name or service not known")

        monkeypatch.setattr(socket, "gethostbyname", fail)
        with pytest.raises(StartError, match=r"listen\.advertise"):
            self._owner(grpc="0.0.0.0:7001")
