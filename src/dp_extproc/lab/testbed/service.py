"""Run the service, and call its admin port as a client."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import httpx
import yaml

from dp_extproc.config import Config, parse_config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.ports import free_ports, free_row
from dp_extproc.lab.testbed.process import CommandProcess
from dp_extproc.lab.testbed.waiting import wait_until

_READY_SECONDS: Final = 30.0
_IDLE_SECONDS: Final = 10.0
_IN_FLIGHT: Final = re.compile(r"^dp_extproc_(?:active_streams|reservations)(?:{.*})? (.*)$", re.MULTILINE)
"""One line of each for every worker process."""


def write_config(pools: list[dict[str, Any]], **sections: dict[str, Any]) -> dict[str, Any]:
    """Make the content of a configuration file: *pools*, free ports for every listener, and *sections* over both."""
    listen = sections.pop("listen", {})
    grpc = f"127.0.0.1:{free_row(listen.get('workers', 1))}"
    admin, inference, envoy_admin = (f"127.0.0.1:{port}" for port in free_ports(3))
    return {
        "listen": {"grpc": grpc, "admin": admin, **listen},
        "envoy": {"inference": inference, "admin": envoy_admin, **sections.pop("envoy", {})},
        "load": {"interval": "100ms", "stale_after": "2s", **sections.pop("load", {})},
        "drain": "10ms",
        **sections,
        "pools": pools,
    }


class ServiceProcess(CommandProcess):
    """Run ``dp-extproc serve`` with a configuration of its own; a context manager."""

    def __init__(self, content: dict[str, Any], *options: str, pause: Callable[[float], None] = time.sleep) -> None:
        """Prepare.

        Args:
            content: Of the configuration file; :func:`write_config` makes one.
            options: Further command-line options.
            pause: Sleeps for so many seconds between two checks of a wait; an exception from it ends the wait.
        """
        self.config: Config = parse_config(yaml.safe_dump(content, sort_keys=False))
        self.admin_url = f"http://{self.config.listen.admin}"
        super().__init__(["serve", "--config", "CONFIG", *options], f"{self.admin_url}/healthz", pause=pause)
        self._config_path = Path(self._directory.name) / "config.yaml"
        self.write(yaml.safe_dump(content, sort_keys=False))
        self._arguments[self._arguments.index("CONFIG")] = str(self._config_path)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def write(self, text: str) -> None:
        """Replace the configuration file, which is whole at any moment."""
        new = self._config_path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._config_path)

    def wait_until_ready(self) -> None:
        """Wait until some pool can serve.

        Raises:
            RuntimeError: None can in time; the message ends with the log.
        """
        wait_until(
            lambda: loopback.CLIENT.get(f"{self.admin_url}/readyz").status_code == httpx.codes.OK,
            _READY_SECONDS,
            lambda: f"the service is not ready; {self.loads()}\n{self.log()}",
            self._pause,
        )

    def wait_until_fresh(self) -> None:
        """Wait until every configured endpoint has a fresh sample.

        Raises:
            RuntimeError: It is not in time; the message ends with the log.
        """

        def all_are() -> bool:
            endpoints = self.loads().get("endpoints") or []  # of several worker processes none may have answered yet
            return {endpoint["state"] for endpoint in endpoints} == {"fresh"}

        wait_until(
            all_are,
            _READY_SECONDS,
            lambda: f"not every endpoint is fresh; {self.loads()}\n{self.log()}",
            self._pause,
        )

    def wait_until_idle(self) -> None:
        """Wait until no stream is open and no reservation is left.

        Raises:
            RuntimeError: Some stay; the message ends with the page of loads.
        """

        def in_flight() -> list[str]:
            return [value for value in _IN_FLIGHT.findall(self.metrics()) if float(value) != 0]

        wait_until(
            lambda: not in_flight(),
            _IDLE_SECONDS,
            lambda: f"reservations or streams are left: {in_flight()}\n{self.loads()}",
            self._pause,
        )

    def loads(self) -> dict[str, Any]:
        """Return the admin port's /loads."""
        page: dict[str, Any] = loopback.CLIENT.get(f"{self.admin_url}/loads").raise_for_status().json()
        return page

    def metrics(self) -> str:
        """Return the admin port's /metrics."""
        return loopback.CLIENT.get(f"{self.admin_url}/metrics").raise_for_status().text
