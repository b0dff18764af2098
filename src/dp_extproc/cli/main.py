"""The command line: ``dp-extproc COMMAND``, with one of the commands that are listed here."""

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from dp_extproc import __version__

_COMMANDS: Final = {
    "serve": ("dp_extproc.cli.serve", "run the external processor"),
    "picker": (
        "dp_extproc.cli.picker",
        "run the external processor as the endpoint picker of an InferencePool, by the flags that charts pass",
    ),
    "check": ("dp_extproc.cli.check", "check a configuration, every engine it names, and an Envoy"),
    "envoy-config": ("dp_extproc.cli.envoy_config", "print the Envoy configuration for a configuration"),
    "init": ("dp_extproc.cli.init", "write a configuration file with every key, to begin with"),
    "schema": ("dp_extproc.cli.schema", "print a JSON Schema of the configuration file, for editors"),
    "engine": ("dp_extproc.lab.engine.command", "run a stand-in for an SGLang server, for tests and demos"),
    "demo": ("dp_extproc.lab.demo.command", "run a whole fleet on this machine and compare placements"),
    "load": ("dp_extproc.lab.demo.load_command", "send requests through routers that run already, and compare them"),
    "simulate": (
        "dp_extproc.lab.simulate.command",
        "compute what placement would gain on a fleet and traffic of your own",
    ),
}
"""Module and summary of each command. ``add_arguments(parser)`` declares options, ``run(args)`` returns the status."""
_PICKER_FLAGS: Final = {"--pool-name", "--pool-namespace", "--pool-group", "--endpoint-selector", "--grpc-port"}
"""Flags of ``picker`` that may come without it. Charts start the image of a picker with flags alone."""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status of the command. As in shells it is 130 after an interrupt that the command did not handle, and
        141 if another program, such as ``head``, reads only the beginning of the output.
    """
    try:
        status = _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # What is left in the buffer is written at the end of the process, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _run(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    given = {each.partition("=")[0] for each in arguments}
    if arguments and arguments[0].startswith("-") and given & _PICKER_FLAGS:
        arguments = ["picker", *arguments]
    parser = argparse.ArgumentParser(prog="dp-extproc", description="Data-parallel-rank-aware routing beside Envoy.")
    parser.add_argument("--version", action="version", version=f"dp-extproc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:  # other commands' libraries stay unloaded
            with _ended_at_once():
                importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(arguments)
    status: int = importlib.import_module(_COMMANDS[args.command][0]).run(args)
    return status


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once while libraries are imported, when nothing has to be stopped.

    A KeyboardInterrupt in a callback of the import machinery would be printed and lost.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever handles the signal otherwise, or ignores it, goes on doing so
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
