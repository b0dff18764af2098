"""The compose project that the test walks through, from nothing to nothing."""

import os
import secrets
from collections.abc import Iterator

import pytest

from compose.base_images import base_images
from compose.checkout import base_image, check_out, pulled_images
from compose.docker_engine import Docker, NoEngineError, docker_engine
from compose.project import Project, compose_command
from dp_extproc.lab.testbed.ports import free_ports

_PORTS = ("PORT", "ADMIN_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
_BUILD_SECONDS = 600.0
_UNUSED = "48h"
"""How long an own engine keeps what was built from older sources."""


def _give_up(why: Exception) -> None:
    """Fail, or skip the test if the caller has allowed that."""
    if os.environ.get("DP_EXTPROC_COMPOSE_TEST") == "if-possible":
        pytest.skip(f"LEFT OUT: {why}")
    pytest.fail(str(why))


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """Give the Docker engine."""
    engine = docker_engine()
    try:
        found = engine.__enter__()
    except NoEngineError as why:
        _give_up(why)
        raise
    try:
        yield found
    finally:
        engine.__exit__(None, None, None)


@pytest.fixture(scope="session")
def missing_images(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Name the images that are not available here; all others exist."""
    images = base_images(docker, [base_image(), *pulled_images()], tmp_path_factory.mktemp("images"))
    try:
        missing = images.__enter__()
    except NoEngineError as why:
        _give_up(why)
        raise
    try:
        yield missing
    finally:
        images.__exit__(None, None, None)


@pytest.fixture(scope="session")
def project(docker: Docker, missing_images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Give the project after ``docker compose up`` in a checkout, with free ports."""
    directory = tmp_path_factory.mktemp("checkout")
    check_out(directory)
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    try:
        compose = compose_command(docker)
    except NoEngineError as why:
        _give_up(why)
        raise
    name = f"dpx{secrets.token_hex(4)}"
    # On an own engine the image keeps its name, so the next run finds its build cache.
    up = Project(docker, compose, name, "dp-extproc-compose-test" if docker.is_ours else name, directory, ports)
    try:
        # Always build, because an image of this name may exist from an earlier state of the source.
        up("up", "--detach", "--build", seconds=_BUILD_SECONDS)
        yield up
    finally:
        _take_down(up)


def _take_down(project: Project) -> None:
    """Remove everything that is left, however the test has ended."""
    docker = project.docker
    for container in docker.lines("ps", "--all", "--quiet", "--filter", f"network={project.name}_default"):
        docker.run("rm", "--force", container, check=False)
    if project.leftovers():
        project(*everything(), "down", "--volumes", "--rmi", "local", "--timeout", "5", check=False)
    if docker.is_ours:
        docker.run("image", "prune", "--force", "--filter", f"until={_UNUSED}")
        return
    for tag in ("local", "demo"):
        docker.run("image", "rm", f"{project.image}:{tag}", check=False)


def everything() -> tuple[str, ...]:
    """Name all profiles."""
    return ("--profile", "load", "--profile", "observe")
