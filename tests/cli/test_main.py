"""The command line as a whole."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["init", "schema"], ids=["shorter than a pipe", "longer than a pipe"])
def test_command_ends_quietly_when_its_output_is_not_read(command: str) -> None:
    """As ``head`` does. The status is that of a shell's own programs."""
    argv = [sys.executable, "-m", "dp_extproc", command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
