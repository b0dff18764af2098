"""HEALTHCHECK of the image: checks the process that runs in this container.

    python -m dp_extproc.runtime.container_health [--ready]

One image runs every command, so the check depends on the command line of process 1. The service is checked at its admin
port (``--ready``: whether it can schedule requests), an engine at its port. Other commands are healthy while they run.

The check runs every few seconds beside the service, so it loads no library but the YAML reader.
"""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from dp_extproc.variables import expand

_TIMEOUT: Final = 2.0
"""Limit for connecting, and for each read, in seconds."""
_FIRST_LINE_BYTES: Final = 4096
"""Most bytes that are read of a response; its first line has the status."""
_DEFAULT_ADMIN: Final = "127.0.0.1:9090"
_DEFAULT_ENGINE_HOST: Final = "127.0.0.1"
"""Defaults of ``serve`` and ``engine``, without loading them. A test keeps them equal."""
_PROGRAM: Final = ("dp-extproc", "dp_extproc")
_ANY_STATUS: Final = range(100, 600)
_OK: Final = range(200, 300)


@dataclass(frozen=True, slots=True)
class Check:
    """An HTTP request, and the statuses that mean health."""

    host: str
    port: int
    path: str
    healthy: range


def check_for(command_line: Sequence[str], *, ready: bool, environment: Mapping[str, str] = os.environ) -> Check | None:
    """Return the check of a process with that command line and environment; None if it has no port.

    Raises:
        ValueError: The command line, or the file that it names, makes no sense.
        OSError: The file cannot be read.
    """
    command, *options = _after_program(command_line) or [""]
    parser = argparse.ArgumentParser()
    parser.add_argument("-c", "--config")
    parser.add_argument("--admin")
    parser.add_argument("--host")
    parser.add_argument("--port")
    given, _ = parser.parse_known_args(options)
    if command == "serve":
        has_urls = any("://" in word for word in options)
        file = given.config or (None if has_urls else environment.get("DP_EXTPROC_CONFIG"))
        if file == "-":
            admin = _DEFAULT_ADMIN  # standard input cannot be read again, so only the default can be checked
        elif file:
            admin = _admin(Path(file), environment)
        else:
            admin = given.admin or environment.get("DP_EXTPROC_ADMIN", "").strip() or _DEFAULT_ADMIN
        host, _, port = admin.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return Check(_reachable(host), int(port), "/readyz" if ready else "/healthz", _OK)
    if command == "engine":
        # An engine with an API key refuses this request, which shows that it runs.
        return Check(_reachable(given.host or _DEFAULT_ENGINE_HOST), int(given.port), "/v1/models", _ANY_STATUS)
    return None


def status_of(check: Check) -> int:
    """Send the request and return the status of the response.

    Raises:
        OSError: There is no response in time.
        ValueError: The response is not HTTP.
    """
    with socket.create_connection((check.host, check.port), _TIMEOUT) as connection:
        connection.sendall(f"GET {check.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            protocol, status = answer.readline(_FIRST_LINE_BYTES).split(None, 2)[:2]
    if not protocol.startswith(b"HTTP/"):
        raise ValueError("the answer is not HTTP")
    return int(status)


def main(arguments: Sequence[str], command_line: Sequence[str]) -> int:
    """Run the check and print a failure.

    Returns:
        The exit status: 0 if the process is healthy, else 1.
    """
    try:
        check = check_for(command_line, ready="--ready" in arguments)
        if check is None or (status := status_of(check)) in check.healthy:
            return 0
        problem = f"{check.path} answers {status}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error)
    sys.stderr.write(f"not well: {problem}\n")
    return 1


def _after_program(command_line: Sequence[str]) -> Sequence[str]:
    """Return the part after the init process, the interpreter and the program itself; nothing for another program."""
    programs = (position for position, word in enumerate(command_line, 1) if Path(word).name in _PROGRAM)
    return command_line[next(programs, len(command_line)) :]


def _admin(path: Path, environment: Mapping[str, str]) -> str:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    listen = document.get("listen") if isinstance(document, dict) else None
    admin = (listen.get("admin") if isinstance(listen, dict) else None) or _DEFAULT_ADMIN
    if isinstance(admin, dict):
        admin = f"{admin.get('host')}:{admin.get('port') or 0}"
    return expand(str(admin), environment)


def _reachable(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name, and if it is unknown, connecting fails
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


if __name__ == "__main__":
    first = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace")
    sys.exit(main(sys.argv[1:], first.split("\0")[:-1]))
