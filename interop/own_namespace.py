"""Runs a module once more in its own namespaces, so that its fixed ports and mounts collide with no other program."""

import os
import subprocess
import sys
from typing import Final

_INSIDE: Final = "DP_EXTPROC_IN_NAMESPACE"


def run_inside(module: str) -> int | None:
    """Run *module* with the same arguments in network and mount namespaces of its own.

    Returns:
        The exit status of that run; None if this process is that run.
    """
    if _INSIDE in os.environ:
        return None
    command = ["unshare", "--net", "--mount", "--map-root-user", sys.executable, "-m", module, *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | {_INSIDE: "1"}, check=False).returncode
