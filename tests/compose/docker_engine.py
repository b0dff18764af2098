"""A Docker engine for the test: the running one, or an own one that ends with the test."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from dp_extproc.lab.testbed.tied_process import end_process
from dp_extproc.lab.testbed.waiting import wait_until

HOME: Final = Path(os.environ.get("DP_EXTPROC_DOCKER", "~/.cache/dp-extproc/docker")).expanduser()
"""Where an own engine keeps its images between runs, outside of every build context."""

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 60.0
_OWN_NETWORKS_ONLY: Final = ("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")
"""Options that leave the host unchanged: no bridge, no filter rules, no forwarding. The test makes its own network."""


class NoEngineError(Exception):
    """No engine answers, and none can be started; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Docker:
    """The Docker client, with its engine."""

    environment: Mapping[str, str]
    is_ours: bool
    """Whether this test alone uses the engine. Nothing of another engine is replaced or removed."""

    def run(self, *arguments: str, check: bool = True, seconds: float = 60) -> str:
        """Run ``docker`` with these arguments, and return its output.

        Raises:
            RuntimeError: It failed; the message has its output.
        """
        return run(["docker", *arguments], self.environment, check=check, seconds=seconds)

    def lines(self, *arguments: str) -> list[str]:
        """Run ``docker``, and return the lines of its output."""
        return self.run(*arguments).split("\n")[:-1]

    def succeeds(self, *arguments: str, seconds: float = 60) -> bool:
        """Return whether ``docker`` ends with status 0."""
        try:
            self.run(*arguments, seconds=seconds)
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return True


def run(
    argv: list[str],
    environment: Mapping[str, str] | None = None,
    *,
    check: bool = True,
    seconds: float = 60,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end, and return its output.

    Raises:
        RuntimeError: It failed; the message has its output.
    """
    ended = subprocess.run(
        argv, check=False, text=True, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=seconds,
        cwd=cwd,
    )  # fmt: skip
    if check and ended.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
    return ended.stdout


@contextmanager
def docker_engine() -> Iterator[Docker]:
    """Give the running engine, or start one.

    Raises:
        NoEngineError: There is none.
    """
    if shutil.which("docker") is None:
        raise NoEngineError("there is no docker client; install Docker (Debian: docker.io)")
    present = Docker(dict(os.environ), is_ours=False)
    if present.succeeds("version", seconds=20):
        yield present
        return
    missing = [program for program in ("dockerd", "iptables") if shutil.which(program) is None]
    if missing:
        raise NoEngineError(f"no Docker engine answers, and {' and '.join(missing)} to run one is not installed")
    if os.geteuid() != 0:
        raise NoEngineError("no Docker engine answers, and only root can start one")
    with _own_engine() as docker:
        yield docker


@contextmanager
def _own_engine() -> Iterator[Docker]:
    with ExitStack() as stack:
        # Short, because paths of sockets are limited to 107 bytes.
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpx-docker-")))
        log = stack.enter_context((state / "log").open("wb"))
        socket = f"unix://{state}/socket"
        process = subprocess.Popen(
            [
                *("dockerd", "--host", socket, "--pidfile", f"{state}/pid", "--exec-root", f"{state}/exec"),
                *("--data-root", str(_data_root(stack, state)), *_OWN_NETWORKS_ONLY),
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(end_process, process, _STOP_SECONDS)
        # BuildKit, which Compose v2 prefers, builds only with the default bridge.
        docker = Docker({**os.environ, "DOCKER_HOST": socket, "DOCKER_BUILDKIT": "0"}, is_ours=True)

        def answers() -> bool:
            if process.poll() is not None:
                raise NoEngineError(f"dockerd ends with {process.returncode}: {_last_line(state)}")
            return docker.succeeds("version", seconds=20)

        try:
            wait_until(answers, _START_SECONDS, lambda: f"dockerd does not answer: {_last_line(state)}")
        except RuntimeError as error:
            raise NoEngineError(str(error)) from None
        yield docker


def _data_root(stack: ExitStack, state: Path) -> Path:
    """Use the kept data directory, unless another run uses it."""
    HOME.mkdir(parents=True, exist_ok=True)
    lock: IO[bytes] = stack.enter_context((HOME / "lock").open("wb"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return state / "data"
    return HOME / "data"


def _last_line(state: Path) -> str:
    lines = (state / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "it says nothing")


if __name__ == "__main__":  # for scripts: whether there is an engine, or one can be started
    try:
        with docker_engine() as found:
            sys.stdout.write(f"Docker {found.run('version', '--format', '{{.Server.Version}}')}")
    except NoEngineError as why:
        sys.exit(str(why))
