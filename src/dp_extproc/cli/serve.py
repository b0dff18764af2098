"""``dp-extproc serve``: run the external processor, in one process or in several."""

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Final

import uvloop

from dp_extproc.cli import start
from dp_extproc.config import ConfigError
from dp_extproc.runtime.process import serve
from dp_extproc.runtime.secrets import external_problems
from dp_extproc.runtime.sockets import StartError, check_ports
from dp_extproc.runtime.worker_context import WorkerContext
from dp_extproc.runtime.workers import serve_with_workers

Load = Callable[[argparse.Namespace, start.WarnLine], start.Start]
"""Reads and checks what options name; it raises ConfigError."""

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start.add_arguments(parser)
    add_log_level(parser)
    # A parent process passes it to the worker processes that it starts.
    parser.add_argument("--worker-context", type=WorkerContext.parse, help=argparse.SUPPRESS)


def add_log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def run(args: argparse.Namespace, load: Load = start.load) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        args: The options.
        load: Makes the configuration of them.

    Returns:
        The exit status: 0 after a signal, 1 if the service cannot start, 2 if the configuration cannot be used.
    """
    context: WorkerContext | None = args.worker_context
    line = _FORMAT if context is None else f"{context}: {_FORMAT}"
    logging.basicConfig(level=args.log_level.upper(), stream=sys.stderr, format=line)
    for chatty in ("httpx", "uvicorn"):  # httpx logs every reading, uvicorn its own start
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _serve(args, context, load)
    except (ConfigError, StartError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _serve(args: argparse.Namespace, context: WorkerContext | None, load: Load) -> None:
    """Check the configuration and the ports, then serve.

    Raises:
        ConfigError: The file, or a file or variable that it names, cannot be used.
        StartError: The service cannot listen.
    """
    # A worker process drops warnings that its parent has logged.
    started = load(args, _log.warning if context is None else _log.debug)
    source, config, text = started.source, started.config, started.text
    if problems := external_problems(config):
        raise ConfigError(source.name, problems)
    if context is not None:
        uvloop.run(serve(config, text, source, context))
        return
    check_ports(started.listen)
    if started.listen.workers > 1:
        asyncio.run(serve_with_workers(started.listen.workers, config, text, source, args.log_level))
    else:
        uvloop.run(serve(config, text, source))
