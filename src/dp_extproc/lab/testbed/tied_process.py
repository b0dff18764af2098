"""Start child processes that end when their parent ends, even by SIGKILL."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

_PR_SET_PDEATHSIG: Final = 1
"""From ``linux/prctl.h``; the setting outlives ``execve``."""


def start_tied(
    argv: Sequence[str], stdout: IO[bytes], stderr: IO[bytes], directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start *argv* in a directory, as a child that gets SIGTERM when the calling thread ends; only on Linux.

    The thread counts, not the process (``prctl(2)``): call this from one that lives long enough.

    The child is in a process group of its own: Ctrl-C in a terminal reaches only the parent, which stops the child in
    order.
    """
    shim = [sys.executable, "-m", "dp_extproc.lab.testbed.tied_process", str(os.getpid()), *argv]
    return subprocess.Popen(
        shim, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0, cwd=directory
    )


def end_process(process: subprocess.Popen[bytes], seconds: float, number: signal.Signals = signal.SIGTERM) -> int:
    """Send a signal to a process that runs, and SIGKILL if it has not ended by it in time. Returns the exit status."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _become(parent: int, argv: Sequence[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above took effect
        sys.exit(1)
    os.execv(argv[0], list(argv))  # noqa: S606 - becomes the program that the caller asked for


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
