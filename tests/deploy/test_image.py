"""The files of the image follow rules that a build does not check."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = [
    line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")
]
URL_HOST = re.compile(r"[a-z]+://([^/:\s\"']+)", re.IGNORECASE)
IMAGE_HOST = re.compile(r"^\s*(?:-\s+)?(?:image:|FROM|ARG PYTHON_IMAGE=)\s*([^/\s{]+[.:][^/\s]*)/", re.MULTILINE)
"""The part before the first slash of an image's name is a host if it has a dot or a port."""
TOP = (ROOT / "Dockerfile", ROOT / "docker-compose.yml", ROOT / ".dockerignore")
SHIPPED = sorted(
    path
    for path in (*TOP, *(ROOT / "deploy").rglob("*"))
    if path.is_file() and path.suffix != ".pyc" and path.name != "values.schema.json"  # its URLs are patterns, examples
)


def values(instruction: str) -> list[str]:
    """Return the arguments of each of these instructions."""
    return [line.split(None, 1)[1] for line in INSTRUCTIONS if line.split()[0] == instruction]


def test_image_names_the_version_of_the_project() -> None:
    """A label that was forgotten at a release would be wrong in every container."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (labels,) = values("LABEL")
    assert f'org.opencontainers.image.version="{project["version"]}"' in labels
    assert f'org.opencontainers.image.licenses="{project["license"]}"' in labels
    assert f'org.opencontainers.image.description="{project["description"]}"' in labels


def test_image_has_a_user_with_a_number() -> None:
    """``runAsNonRoot`` of Kubernetes cannot resolve a user name, and would not start the container."""
    assert values("USER") == ["65532:65532"]


def test_image_is_built_by_both_builders() -> None:
    """The builder before BuildKit supports no options of RUN, and only --from and --chown of COPY."""
    assert not any(value.startswith("--") for value in values("RUN"))
    assert {word for value in values("COPY") for word in value.split() if word.startswith("--")} <= {
        "--from=build",
        "--from=build-demo",
    }
    assert not DOCKERFILE.startswith("# syntax")


def test_image_has_the_libraries_of_every_source_of_endpoints() -> None:
    """Without them a configuration that works elsewhere is refused in a container, or misses TTLs."""
    (extras,) = re.findall(r"dependencies\.py ([a-z ]+) > dependencies\.txt", DOCKERFILE)
    script = [sys.executable, str(ROOT / "deploy/image/dependencies.py"), *extras.split()]
    installed = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (each for name in ("dns", "picker") for each in project["optional-dependencies"][name])
    assert {*project["dependencies"], *extras} == set(installed)


def test_last_stage_is_the_service() -> None:
    """Without a target, a build makes the small image."""
    assert values("FROM")[-1] == "runtime AS service"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_names_the_host_of_a_registry(path: Path) -> None:
    """A user behind a mirror configures it in pip and Docker, and no file here bypasses that.

    Hosts here are services of the compose file, which have no dot, and this machine.
    """
    text = path.read_text(encoding="utf-8")
    assert IMAGE_HOST.findall(text) == []
    assert {host for host in URL_HOST.findall(text) if "." in host} <= {"127.0.0.1"}


def test_hosts_of_images_and_urls_are_found() -> None:
    """Otherwise the test above could not fail."""
    assert IMAGE_HOST.findall("FROM mirror.example/python:3.11\n  image: mirror:5000/envoy\n") == [
        "mirror.example",
        "mirror:5000",
    ]
    assert IMAGE_HOST.findall("FROM python:3.11-slim AS a\nimage: prom/prometheus:v3.5.0\n") == []
    assert URL_HOST.findall("pip --index https://mirror.example/simple") == ["mirror.example"]
