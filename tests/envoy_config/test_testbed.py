"""The helpers of the test bed that run Envoy and reserve ports."""

import subprocess
import sys
import time

import pytest

from dp_extproc.config import BodyMode
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_port, free_ports, free_row
from envoy_config.harness import make_config


def test_envoy_process_reports_the_log_if_envoy_refuses_its_configuration() -> None:
    """The error names what is wrong with the configuration."""
    envoy = EnvoyProcess(make_config(BodyMode.BUFFERED, free_ports(3)), bootstrap="static_resources: {nonsense: 1}")

    with pytest.raises(RuntimeError, match="nonsense"), envoy:
        pass


def test_tied_process_ends_with_its_starter() -> None:
    """No Envoy remains if its starter is killed."""
    code = (
        "import sys; from pathlib import Path\n"
        "from dp_extproc.lab.testbed.tied_process import start_tied\n"
        "child = start_tied(['/bin/sleep', '60'], sys.stdout.buffer, sys.stderr.buffer)\n"
        "while 'sleep' not in Path(f'/proc/{child.pid}/comm').read_text(): pass\n"
        "print(child.pid, flush=True); sys.stdin.read()\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter.stdin, starter.stdout:
        child = int(starter.stdout.readline())
        starter.kill()
        starter.wait()

        deadline = time.monotonic() + 10
        while _is_alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123 - read at once
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_free_ports_differ_within_one_call() -> None:
    """Ports of one call can be used together."""
    assert len(set(free_ports(50))) == 50
    assert free_port() < 32_768


def test_free_ports_differ_between_calls() -> None:
    """A caller may not listen on its port yet at the time of the next call."""
    ports = [free_port() for _ in range(300)]  # Random ports alone would collide in 97 of 100 runs.
    rows = [first + place for first in (free_row(3) for _ in range(100)) for place in range(3)]
    assert len({*ports, *rows}) == 600


def test_free_ports_are_reused_after_many_calls() -> None:
    """The supply never runs out, because early ports return to it."""
    assert all(free_ports(500) for _ in range(50))
