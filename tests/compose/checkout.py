"""What a newcomer has who runs docker compose: the files of the repository; and wheels, which builds find there."""

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
"""Of the base image."""
_OLDER: Final = ("async-timeout>=4.0.3",)
"""Debian's Python is 3.11.2, for which a dependency asks for one more; the index is asked by another Python."""


def check_out(directory: Path) -> None:
    """Copy what the images are built and run from, and fetch wheels: builds may have no network."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / part)
    _fetch_wheels(directory / "wheels")


def base_image() -> str:
    """Give the name of the image that the project's own are built on."""
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("ARG PYTHON_IMAGE="):
            return line.partition("=")[2]
    raise AssertionError("the Dockerfile names no Python")


def services() -> dict[str, dict[str, Any]]:
    """Read the services of docker-compose.yml, as they are written."""
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = document["services"]
    return found


def foreign_images() -> list[str]:
    """Give the names of the images that are not built here."""
    return sorted({service["image"] for service in services().values() if "build" not in service})


def _fetch_wheels(directory: Path) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    wanted = [*pyproject["build-system"]["requires"], *project["dependencies"], *_OLDER]
    extras = project["optional-dependencies"]
    wanted += [each for extra in ("envoy", "lab") for each in extras[extra] if not each.startswith(project["name"])]
    machine = platform.machine()
    # pip does not know that a newer C library runs what was built for an older one. Debian bookworm has 2.36.
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
