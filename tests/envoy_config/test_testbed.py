"""The helper that runs Envoy: it waits, reports, and leaves nothing behind."""

import subprocess
import sys
import time

import pytest

from dp_extproc.config import BodyMode
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_port, free_ports, free_row
from envoy_config.harness import make_config


def test_a_configuration_that_envoy_refuses_is_reported_with_its_log() -> None:
    """Whoever starts a broken configuration reads why it is broken."""
    envoy = EnvoyProcess(make_config(BodyMode.BUFFERED, free_ports(3)), bootstrap="static_resources: {nonsense: 1}")

    with pytest.raises(RuntimeError, match="nonsense"), envoy:
        pass


def test_envoy_ends_with_whoever_started_it() -> None:
    """A starter that is killed leaves no Envoy behind."""
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


def test_free_ports_are_different() -> None:
    """Ports that are asked for together can be used together."""
    assert len(set(free_ports(50))) == 50
    assert free_port() < 32_768


def test_free_ports_are_given_once() -> None:
    """Who asked for a port may not listen on it yet when the next one asks."""
    ports = [free_port() for _ in range(300)]  # by chance alone two of so many are the same, 97 times of 100
    rows = [first + place for first in (free_row(3) for _ in range(100)) for place in range(3)]
    assert len({*ports, *rows}) == 600


def test_free_ports_are_never_used_up() -> None:
    """Those of long ago are given again."""
    assert all(free_ports(500) for _ in range(50))
