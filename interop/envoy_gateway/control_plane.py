"""Runs Envoy Gateway without Kubernetes: resources are files, and its Envoy is a process on this machine."""

import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.tied_process import end_process, start_tied
from dp_extproc.lab.testbed.waiting import wait_until

NAMESPACE: Final = "default"
GATEWAY: Final = "shared"
PORT: Final = 8080
TLS_PORT: Final = 8443
_READY: Final = "http://127.0.0.1:8081/readyz"
"""Envoy Gateway's ports are fixed, so a run has a network namespace of its own."""
_EXPECTED_VERSION: Final = "1.39.0"
"""The version of Envoy that Envoy Gateway 1.9 looks for. It does not ask the program for its version."""
_READ: Final = "reconcile finished"
"""What its log has after each change of the files."""
_READ_SECONDS: Final = 30.0
"""It checks every field of every file for each change, which takes two seconds of a processor."""
_ATTEMPTS: Final = 2
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_STATUS: Final = re.compile(
    r"Got new status for (\w+)\n(.*?)\n\t\{\"runner\": \"provider\", \"key\": \"([^\"]+)\"\}", re.DOTALL
)


class ControlPlane:
    """``envoy-gateway server`` and the Envoy that it runs; a context manager."""

    def __init__(self, program: Path, envoy: Path, directory: Path, **settings: Any) -> None:
        """Prepare.

        Args:
            program: Of Envoy Gateway.
            envoy: Program of the Envoy that it runs.
            directory: A new directory for all its files.
            settings: More sections of its configuration.
        """
        self.url = f"http://127.0.0.1:{PORT}"
        self.admin_url = ""  # Envoy's admin port is another one in each run.
        self._program = program
        self.directory = directory
        self._resources = directory / "resources"
        self._resources.mkdir(parents=True)
        found = directory / "data" / "envoy-versions" / _EXPECTED_VERSION / "bin" / "envoy"
        found.parent.mkdir(parents=True)
        found.symlink_to(envoy)
        folders = {f"{each}Home": str(directory / each) for each in ("data", "state")}
        infrastructure = {**folders, "configHome": str(directory), "runtimeDir": str(directory / "run")}
        provider = {
            "resource": {"type": "File", "file": {"paths": [str(self._resources)]}},
            "infrastructure": {"type": "Host", "host": infrastructure},
        }
        content = {
            "apiVersion": "gateway.envoyproxy.io/v1alpha1",
            "kind": "EnvoyGateway",
            "gateway": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
            "provider": {"type": "Custom", "custom": provider},
            "extensionApis": {"enableBackend": True, "enableEnvoyPatchPolicy": True},
            **settings,
        }
        (directory / "envoy-gateway.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        certificates = [str(self._program), "certgen", "--local", "--config-home", str(self.directory)]
        subprocess.run(certificates, check=True, capture_output=True)
        log = self._stack.enter_context(self._log_path.open("ab"))
        argv = [str(self._program), "server", "--config-path", str(self.directory / "envoy-gateway.yaml")]
        process = start_tied(argv, log, log)
        self._stack.callback(end_process, process, _STOP_SECONDS)

        def is_ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"envoy-gateway ended:\n{self.log()[-3000:]}")
            return loopback.CLIENT.get(_READY).is_success and self._is_envoy_ready()

        try:
            wait_until(is_ready, _START_SECONDS, lambda: f"envoy-gateway is not ready:\n{self.log()[-3000:]}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def apply(self, name: str, text: str) -> None:
        """Write resources as one file, which is whole at any moment."""

        def put() -> None:
            new = self.directory / "new.yaml"
            new.write_text(text, encoding="utf-8")
            new.replace(self._resources / f"{name}.yaml")

        self._change(put)

    def delete(self, name: str) -> None:
        """Delete a file of resources."""
        self._change(lambda: (self._resources / f"{name}.yaml").unlink(missing_ok=True))

    def _change(self, change: Callable[[], object]) -> None:
        """Change files, and wait until they were read. A change that Envoy Gateway did not see is made again."""
        read = self.log().count(_READ) if self._log_path.exists() else 0
        for _ in range(_ATTEMPTS):
            change()
            if not self._log_path.exists():  # it does not run yet
                return
            with suppress(RuntimeError):
                wait_until(lambda: self.log().count(_READ) > read, _READ_SECONDS, lambda: "not read")
                return
        raise RuntimeError(f"envoy-gateway did not read a change:\n{self.log()[-3000:]}")

    def conditions(self, kind: str, name: str) -> dict[str, tuple[str, str]]:
        """Return the last status of an object: status and message of each condition."""
        found = [text for of, text, key in _STATUS.findall(self.log()) if (of, key) == (kind, f"{NAMESPACE}/{name}")]
        content = yaml.safe_load(found[-1]) if found else {}
        statuses = [content, *content.get("ancestors", ()), *content.get("parents", ())]
        listed = [each for status in statuses for each in status.get("conditions", ())]
        return {each["type"]: (each["status"], each["message"]) for each in listed}

    def dump(self) -> dict[str, Any]:
        """Return Envoy's configuration, without the endpoints of clusters that it resolves."""
        page: dict[str, Any] = loopback.CLIENT.get(f"{self.admin_url}/config_dump").raise_for_status().json()
        return page

    def listeners(self) -> list[str]:
        """Return the names of Envoy's active listeners."""
        page = loopback.CLIENT.get(f"{self.admin_url}/listeners").raise_for_status().text
        return [line.partition("::")[0] for line in page.splitlines()]

    def statistic(self, name: str) -> int:
        """Return one of Envoy's counters or gauges."""
        page = loopback.CLIENT.get(f"{self.admin_url}/stats", params={"filter": f"^{re.escape(name)}$"}).text
        return int(page.rpartition(": ")[2] or 0)

    def envoy_log(self) -> str:
        """Return the log of Envoy so far."""
        (path,) = self.directory.glob("state/envoy-runs/*/stderr.log")
        return path.read_text(encoding="utf-8", errors="replace")

    def log(self) -> str:
        """Return the log of Envoy Gateway and its Envoy so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def _log_path(self) -> Path:
        return self.directory / "envoy-gateway.log"

    def _is_envoy_ready(self) -> bool:
        for path in self.directory.glob("run/*/admin-address.txt"):
            self.admin_url = f"http://{path.read_text(encoding='utf-8')}"
        try:
            return bool(self.admin_url) and loopback.CLIENT.get(f"{self.admin_url}/ready").is_success
        except httpx.InvalidURL:  # the file is being written
            return False
