"""For HEALTHCHECK of the image: ask what runs in this container whether it is well.

    python -m dp_extproc.runtime.container_health [--ready]

One image runs every command, so the command line of process 1 tells what to ask: the service its admin port (with
``--ready`` whether it can place requests), an engine its port. Any other command counts as healthy while it runs.

It runs every few seconds beside the service, so it loads no library but the reader of the file.
"""

import argparse
import ipaddress
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

_TIMEOUT: Final = 2.0
_FIRST_LINE_BYTES: Final = 4096
_DEFAULT_ADMIN: Final = "127.0.0.1:9090"
_DEFAULT_ENGINE_HOST: Final = "127.0.0.1"
"""A test holds the two defaults to those of ``serve`` and ``engine``."""
_PROGRAM: Final = ("dp-extproc", "dp_extproc")
_ANY_STATUS: Final = range(100, 600)
_OK: Final = range(200, 300)


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask over HTTP, and which answers tell that all is well."""

    host: str
    port: int
    path: str
    well: range


def question_for(command_line: Sequence[str], *, ready: bool) -> Question | None:
    """Tell what to ask a process with that command line; None if it cannot be asked anything.

    Raises:
        ValueError: The command line, or the file that it names, makes no sense.
        OSError: The file cannot be read.
    """
    command, *options = _after_program(command_line) or [""]
    parser = argparse.ArgumentParser()
    for names in (("-c", "--config"), ("--host",), ("--port",)):
        parser.add_argument(*names)
    told, _ = parser.parse_known_args(options)
    if command == "serve":
        if told.config is None:
            raise ValueError("serve was started without a configuration file")
        host, port = _admin(Path(told.config))
        return Question(_reachable(host), port, "/readyz" if ready else "/healthz", _OK)
    if command == "engine":
        # An engine refuses strangers when it has an API key, which is an answer, too.
        return Question(_reachable(told.host or _DEFAULT_ENGINE_HOST), int(told.port), "/v1/models", _ANY_STATUS)
    return None


def ask(question: Question) -> int:
    """Give the status of the answer.

    Raises:
        OSError: There is none in time.
        ValueError: It is not HTTP.
    """
    with socket.create_connection((question.host, question.port), _TIMEOUT) as connection:
        connection.sendall(f"GET {question.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            protocol, status = answer.readline(_FIRST_LINE_BYTES).split(None, 2)[:2]
    if not protocol.startswith(b"HTTP/"):
        raise ValueError("the answer is not HTTP")
    return int(status)


def main(arguments: Sequence[str], command_line: Sequence[str]) -> int:
    """Ask, and say what is wrong. Returns the exit status: 0 if all is well, else 1."""
    try:
        question = question_for(command_line, ready="--ready" in arguments)
        if question is None:
            return 0
        status = ask(question)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.stderr.write(f"not well: {error}\n")
        return 1
    if status not in question.well:
        sys.stderr.write(f"not well: {question.path} answers {status}\n")
        return 1
    return 0


def _after_program(command_line: Sequence[str]) -> list[str] | None:
    """Leave out what stands before the command: an init process, the interpreter, the program itself."""
    for position, word in enumerate(command_line):
        if Path(word).name in _PROGRAM:
            return list(command_line[position + 1 :]) or None
    return None


def _admin(path: Path) -> tuple[str, int]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    listen = document.get("listen") if isinstance(document, dict) else None
    admin = (listen.get("admin") if isinstance(listen, dict) else None) or _DEFAULT_ADMIN
    if isinstance(admin, dict):
        return str(admin.get("host")), int(admin.get("port") or 0)
    host, _, port = str(admin).rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _reachable(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a name; an unknown one fails when it is dialled
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"


if __name__ == "__main__":
    first = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace")
    sys.exit(main(sys.argv[1:], first.split("\0")[:-1]))
