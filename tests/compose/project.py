"""A compose project with its containers."""

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from compose.docker_engine import Docker, NoEngineError, run

_COMPOSE: Final = "com.docker.compose"
_LABEL: Final = f"{_COMPOSE}.project"
_FETCH: Final = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"


def compose_command(docker: Docker) -> list[str]:
    """Find the compose command: from the variable ``COMPOSE``, the plugin, or the older program.

    Raises:
        NoEngineError: There is none.
    """
    if wanted := os.environ.get("COMPOSE"):
        return shlex.split(wanted)
    if docker.succeeds("compose", "version"):
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    raise NoEngineError("there is no docker compose; install it (Debian: docker-compose)")


@dataclass(frozen=True, slots=True)
class Project:
    """The containers of one ``docker compose up``."""

    docker: Docker
    compose: list[str]
    name: str
    image: str
    """The name under which the project builds its images."""
    directory: Path
    ports: dict[str, int]
    """Ports on the host, by the variables of docker-compose.yml that set them."""

    def __call__(self, *arguments: str, check: bool = True, seconds: float = 120, **variables: str) -> str:
        """Run a compose command with these variables set, and return its output."""
        variables |= {name: str(port) for name, port in self.ports.items()}
        environment = {**self.docker.environment, **variables, "DP_EXTPROC_IMAGE": self.image}
        argv = [*self.compose, "--project-name", self.name, *arguments]
        return run(argv, environment, check=check, seconds=seconds, cwd=self.directory)

    def containers(self, service: str) -> dict[str, str]:
        """Return the ids of a service's containers, by names such as ``decode-1``, whether or not they run."""
        filters = (f"{_LABEL}={self.name}", f"{_COMPOSE}.service={service}", f"{_COMPOSE}.oneoff=False")
        labels = [word for each in filters for word in ("--filter", f"label={each}")]
        number = f'{{{{.ID}}}} {{{{.Label "{_COMPOSE}.container-number"}}}}'
        found = [line.split() for line in self.docker.lines("ps", "--all", "--format", number, *labels)]
        return {f"{service}-{number}": container for container, number in found}

    def container(self, name: str) -> str:
        """Return the id of the container of a service, or of one of its containers, such as ``decode-1``."""
        service, _, number = name.rpartition("-")
        if number.isdecimal():
            return self.containers(service)[name]
        (found,) = self.containers(name).values()
        return found

    def inspect(self, service: str) -> dict[str, Any]:
        """Return all that Docker reports of a service's container."""
        (found,) = json.loads(self.docker.run("inspect", self.container(service)))
        described: dict[str, Any] = found
        return described

    def address(self, service: str) -> str:
        """Return the address of a container in the project's network, empty if it does not run."""
        (network,) = self.inspect(service)["NetworkSettings"]["Networks"].values()
        address: str = network["IPAddress"]
        return address

    def network(self) -> str:
        (found,) = self.docker.lines("network", "ls", "--quiet", "--filter", f"label={_LABEL}={self.name}")
        return found

    def execute(self, service: str, *argv: str) -> str:
        """Run a command in a container."""
        return self.docker.run("exec", self.container(service), *argv)

    def page(self, service: str, url: str) -> str:
        """Fetch a page from within a container."""
        return self.execute(service, "python", "-c", _FETCH, url)

    def journal(self, engine: str) -> list[dict[str, Any]]:
        """Return the request journal of an engine."""
        found: list[dict[str, Any]] = json.loads(self.page(engine, "http://127.0.0.1:30000/debug/requests"))["requests"]
        return found

    def leftovers(self) -> list[str]:
        """Name the containers, networks and volumes of the project."""
        ours = ("--quiet", "--filter", f"label={_LABEL}={self.name}")
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return [name for kind in kinds for name in self.docker.lines(*kind, *ours)]
