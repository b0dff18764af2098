"""Run stand-in engines, and call their debug endpoints as a client."""

import ssl
import time
from collections.abc import Callable
from typing import Any

from dp_extproc.engines.model import in_url
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.process import CommandProcess


class EngineProcess(CommandProcess):
    """Run ``dp-extproc engine``; a context manager."""

    def __init__(
        self,
        role: str,
        dp_size: int,
        *options: str,
        host: str = "127.0.0.1",
        port: int | None = None,
        tls: ssl.SSLContext | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare.

        Args:
            role: prefill, decode or unified.
            dp_size: DP ranks.
            options: Further command-line options.
            host: The address that it listens on.
            port: Its API port, in place of a free one.
            tls: For its API port, if the options make it serve TLS there.
            pause: Sleeps for so many seconds between two checks of a wait; an exception from it ends the wait.
        """
        self.role = role
        free, self.bootstrap_port, debug_port = free_ports(3)
        self.port = free if port is None else port
        self.url = f"{'http' if tls is None else 'https'}://{in_url(host)}:{self.port}"
        self.debug_url = f"http://{in_url(host)}:{debug_port}/debug"
        arguments = ["engine", "--role", role, "--dp-size", str(dp_size), "--host", host, "--port", str(self.port)]
        arguments += ["--debug-port", str(debug_port)]
        if role == "prefill":
            arguments += ["--bootstrap-port", str(self.bootstrap_port)]
        super().__init__([*arguments, *options], f"{self.url}/v1/models", tls=tls, pause=pause)

    def change(self, *options: str) -> None:
        """Add options for the next start; of a repeated option the last value counts."""
        self._arguments += options

    def requests(self) -> list[dict[str, Any]]:
        """Return every inference request that the engine has received, oldest first."""
        page = loopback.CLIENT.get(f"{self.debug_url}/requests").raise_for_status().json()
        received: list[dict[str, Any]] = page["requests"] if isinstance(page, dict) else page
        return received

    def forget(self) -> None:
        """Clear what :meth:`requests` returns."""
        loopback.CLIENT.delete(f"{self.debug_url}/requests").raise_for_status()

    def steps(self) -> list[dict[str, Any]]:
        """Return the steps of its groups of ranks so far."""
        page = loopback.CLIENT.get(f"{self.debug_url}/steps").raise_for_status().json()
        groups: list[dict[str, Any]] = page["groups"]
        return groups

    def fault(self, **faults: str | dict[str, Any]) -> None:
        """Switch faults: ``fault(loads="hang", inference={"kind": "reset", "after": 2})``; ``ok`` switches one off."""
        loopback.CLIENT.post(f"{self.debug_url}/faults", json=faults).raise_for_status()

    def heal(self) -> None:
        """Switch all faults off."""
        self.fault(**dict.fromkeys(loopback.CLIENT.get(f"{self.debug_url}/faults").raise_for_status().json(), "ok"))
