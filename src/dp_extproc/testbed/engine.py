"""Strict engines under test, with their debug endpoints as a client sees them."""

from typing import Any

import httpx

from dp_extproc.testbed.ports import free_ports
from dp_extproc.testbed.process import CommandProcess


class EngineProcess(CommandProcess):
    """``dp-extproc engine`` on a free port; a context manager."""

    def __init__(self, role: str, dp_size: int, *options: str) -> None:
        """Prepare.

        Args:
            role: prefill, decode or unified.
            dp_size: DP ranks.
            options: Further command-line options.
        """
        self.role = role
        self.port, self.bootstrap_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["engine", "--role", role, "--dp-size", str(dp_size), "--port", str(self.port)]
        if role == "prefill":
            arguments += ["--bootstrap-port", str(self.bootstrap_port)]
        super().__init__([*arguments, *options], f"{self.url}/v1/models")

    def requests(self) -> list[dict[str, Any]]:
        """Return every inference request it has received, oldest first."""
        page = httpx.get(f"{self.url}/debug/requests").raise_for_status().json()
        received: list[dict[str, Any]] = page["requests"] if isinstance(page, dict) else page
        return received

    def forget(self) -> None:
        """Clear what :meth:`requests` returns."""
        httpx.delete(f"{self.url}/debug/requests").raise_for_status()

    def steps(self) -> list[dict[str, Any]]:
        """Return what the steps of its groups of ranks have taken so far."""
        groups: list[dict[str, Any]] = httpx.get(f"{self.url}/debug/steps").raise_for_status().json()["groups"]
        return groups

    def fault(self, **faults: str) -> None:
        """Switch faults of its pages: ``fault(loads="hang")``; ``ok`` switches one off."""
        httpx.post(f"{self.url}/debug/faults", json=faults).raise_for_status()
