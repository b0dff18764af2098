"""Run real processes: replicas and a Redis server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.tied_process import start_tied

TESTS = Path(__file__).parent.parent


class MemberProcess:
    """Run ``sync/member.py`` as a child."""

    def __init__(self, url: str, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sync.member", url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self.send_signal(signal.SIGKILL)
        self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP or SIGKILL."""
        self._process.send_signal(number)

    def do(self, command: str, number: int = 0) -> dict[str, Any]:
        """Run a command, and return the attempts that the process has open, and those of its peers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command} {number}\n".encode())
        self._process.stdin.flush()
        state: dict[str, Any] = json.loads(self._process.stdout.readline())
        return state


class RedisProcess:
    """Run a ``redis-server`` on a free port."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("neither redis-server nor valkey-server is installed (Debian: apt install redis-server)")
        self._arguments = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *options]
        self._log = directory / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = start_tied(self._arguments, log, log)
        deadline = time.monotonic() + 20
        while True:
            try:
                with redis.Redis(port=self.port, retry=Retry(NoBackoff(), 0)) as client:
                    client.ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """Kill, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(number)


@contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[RedisProcess]:
    """Run a Redis server."""
    server = RedisProcess(directory, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()
