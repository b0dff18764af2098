"""A fleet starts without a configuration file: by options and variables, or from standard input; through real Envoy."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from dp_extproc.config import parse_config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports, free_row
from e2e.stack import FAST, PREFILL_RANKS
from patience import wait_for

SHORT = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """Run a prefill and a decode engine."""
    options = ("--dp-attention", *FAST)
    with EngineProcess("prefill", PREFILL_RANKS, *options) as prefill, EngineProcess("decode", 2, *options) as decode:
        yield prefill, decode


@dataclass(frozen=True, slots=True)
class Started:
    """A running service, the pages of its admin port, and its log."""

    process: subprocess.Popen[bytes]
    admin: str
    log: Path

    def page(self, path: str) -> str:
        return loopback.CLIENT.get(f"http://{self.admin}{path}").text

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return loopback.CLIENT.get(f"http://{self.admin}/readyz").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def serving(
    options: Sequence[str], admin: str, directory: Path, *, standard_input: Path, variables: Mapping[str, str]
) -> Iterator[Started]:
    """Run ``serve``, wait until it is ready, and stop it at the end."""
    log = directory / "log"
    with log.open("wb") as output, standard_input.open("rb") as text:
        argv = [sys.executable, "-m", "dp_extproc", "serve", *options]
        environment = {**os.environ, **variables}
        with subprocess.Popen(argv, stdin=text, stdout=output, stderr=output, env=environment) as process:
            started = Started(process, admin, log)
            try:
                wait_for(started.is_ready, 30)
                yield started
            finally:
                wait_for(lambda: has_ended(process), 30)


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Send SIGTERM; the second one cuts the drain short."""
    process.send_signal(signal.SIGTERM)
    return process.poll() is not None


def envoy_config(options: Sequence[str], standard_input: Path, variables: Mapping[str, str]) -> str:
    argv = [sys.executable, "-m", "dp_extproc", "envoy-config", *options]
    with standard_input.open("rb") as text:
        printed = subprocess.run(
            argv, stdin=text, stdout=subprocess.PIPE, env={**os.environ, **variables}, timeout=60, check=True
        )
    return printed.stdout.decode()


def ask(envoy: str, client: str) -> int:
    """Send one request through an Envoy with this printed configuration, and return the status."""
    addresses = parse_config(
        f"envoy: {{inference: '{client}', admin: '127.0.0.1:{free_ports(1)[0]}'}}\n"
        "pools: [{models: [m], workers: {endpoints: ['http://a:1']}}]"
    )
    with EnvoyProcess(
        addresses, bootstrap=envoy.replace("port_value: 9901", f"port_value: {addresses.envoy.admin.port}")
    ):
        return loopback.CLIENT.post(f"http://{client}/generate", json=SHORT, timeout=60).status_code


def test_options_and_variables_start_a_fleet(engines: tuple[EngineProcess, EngineProcess], tmp_path: Path) -> None:
    """The same options print the configuration of Envoy."""
    prefill, decode = engines
    grpc, admin, client = (f"127.0.0.1:{port}" for port in free_ports(3))
    options = ["--prefill", prefill.url, "--listen", grpc, "--admin", admin, "--envoy-listen", client]
    variables = {"DP_EXTPROC_DECODE": decode.url}
    nothing = Path(os.devnull)
    with serving(options, admin, tmp_path, standard_input=nothing, variables=variables) as service:
        decode.forget()
        assert ask(envoy_config(options, nothing, variables), client) == 200
        (request,) = decode.requests()
        assert request["outcome"] == "finished"
        assert "Traceback" not in service.log.read_text()


def test_standard_input_starts_a_fleet_of_two_processes(
    engines: tuple[EngineProcess, EngineProcess], tmp_path: Path
) -> None:
    """Worker processes get the text from their parent. A reload has nothing to read, which the log has once."""
    prefill, decode = engines
    admin, client = (f"127.0.0.1:{port}" for port in free_ports(2))
    text = tmp_path / "text"
    text.write_text(
        "listen:\n  grpc: 127.0.0.1:${GRPC_PORT}\n  workers: ${PROCESSES:-2}\n  admin: ${ADMIN}\n"
        f"envoy: {{inference: '{client}'}}\nreload: watch\ndrain: 10ms\npools:\n- models: ['*']\n"
        f"  prefill: {{endpoints: ['{prefill.url}']}}\n  decode: {{endpoints: ['{decode.url}']}}\n"
    )
    variables = {"GRPC_PORT": str(free_row(2)), "ADMIN": admin}
    with serving(["-c", "-"], admin, tmp_path, standard_input=text, variables=variables) as service:
        assert ask(envoy_config(["--config=-"], text, variables), client) == 200
        for count in (1, 2):
            service.process.send_signal(signal.SIGHUP)
            refused = f'dp_extproc_config_reloads_total{{outcome="refused"}} {count}.0'
            wait_for(lambda line=refused: line in service.page("/metrics"))  # type: ignore[misc]
        wait_for(lambda: service.log.read_text().count("ext_proc on") == 2)
        log = service.log.read_text()
        assert log.count("it came from the standard input, which cannot be read again, so nothing is reloaded") == 1
        assert "Traceback" not in log
