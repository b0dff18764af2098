"""A checkout as a new user of docker compose has it: the repository's files, and wheels for the builds."""

import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = (
    ".dockerignore", "Dockerfile", "LICENSE", "README.md", "deploy", "docker-compose.yml", "pyproject.toml", "src",
)  # fmt: skip

_PYTHON: Final = "3.11"
"""Python version of the base image."""
_OLDER: Final = ("async-timeout>=4.0.3",)
"""Debian's Python is 3.11.2 and a dependency needs one patch more, so another Python queries the index."""


def check_out(directory: Path) -> None:
    """Copy what the images are built and run from, and fetch wheels, because builds may have no network."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / part)
    _fetch_wheels(directory / "wheels")


def base_image() -> str:
    """Name the base image of the project's own images."""
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("ARG PYTHON_IMAGE="):
            return line.partition("=")[2]
    raise AssertionError("the Dockerfile names no Python")


def services() -> dict[str, dict[str, Any]]:
    """Read the services of docker-compose.yml as they are written."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = document["services"]
    return found


def pulled_images() -> list[str]:
    """Name the images that are not built here."""
    return sorted({service["image"] for service in services().values() if "build" not in service})


def _fetch_wheels(directory: Path) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    wanted = [*pyproject["build-system"]["requires"], *project["dependencies"], *_OLDER]
    extras = project["optional-dependencies"]
    wanted += [each for extra in extras.values() for each in extra if not each.startswith(project["name"])]
    machine = platform.machine()
    # pip cannot see that a newer C library runs wheels for an older one. Debian bookworm has 2.36.
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(36, 4, -1)] + [f"manylinux2014_{machine}"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), "--only-binary=:all:"),
            *("--python-version", _PYTHON, "--implementation", "cp"),
            *("--abi", f"cp{_PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none"),
            *(word for tag in tags for word in ("--platform", tag)),
            *wanted,
        ],
        check=True, timeout=300,
    )  # fmt: skip
