"""Define what the commands that send requests share: options, the console, and a check of what is installed."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

from rich.console import Console

from dp_extproc.lab.demo.interrupts import Interrupts, run_until_interrupted
from dp_extproc.lab.testbed.envoy import find_envoy

WIDTH: Final = 100
"""Columns of what is printed to a file or a pipe; the tables need most of them."""


def add_traffic(parser: argparse.ArgumentParser, *, requests: int, concurrency: int) -> None:
    """Declare the options of the traffic."""
    add = parser.add_argument
    add("--requests", type=positive, default=requests, metavar="N", help="for each router (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="S", help="of the traffic (default: %(default)s)")
    add(
        "--concurrency", type=positive, default=concurrency, metavar="N",
        help="requests under way at a time (default: %(default)s)",
    )  # fmt: skip


def positive(text: str) -> int:
    """Read a number that is at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def make_console() -> Console:
    """Make the console: as wide as the terminal, or wide enough for the tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def end_help_with_missing_parts(parser: argparse.ArgumentParser, *, needs_envoy: bool) -> None:
    """Let the help of a command end with what has to be installed, if anything is missing."""
    parser.epilog = missing_parts(needs_envoy=needs_envoy)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # the remedy could not be copied from folded text


def run_command(name: str, work: Callable[[Console, Interrupts], None], *, needs_envoy: bool) -> int:
    """Do the work of a command until it is done or interrupted.

    Args:
        name: The name of the command, for the message.
        work: Prints to the console, and stops at an interrupt.
        needs_envoy: Whether Envoy is started, too.

    Returns:
        The exit status of :func:`run_until_interrupted`; 1 when a part is missing, which is printed.
    """
    if (missing := missing_parts(needs_envoy=needs_envoy)) is not None:
        sys.stderr.write(f"dp-extproc {name}: {missing}\n")
        return 1
    console = make_console()
    return run_until_interrupted(console, partial(work, console))


def missing_parts(*, needs_envoy: bool) -> str | None:
    """Return one line with what has to be installed; None when nothing is missing.

    Args:
        needs_envoy: Whether Envoy is started, too.
    """
    missing = []
    if importlib.util.find_spec("openai") is None:
        missing.append("the Python package openai")
    if needs_envoy:
        try:
            find_envoy()
        except FileNotFoundError:
            missing.append("Envoy")
    if not missing:
        return None
    are = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {are} missing; in the checkout: pip install '.[demo]'"
