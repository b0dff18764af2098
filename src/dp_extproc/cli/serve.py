"""``dp-extproc serve``: run the external processor, in one process or in several."""

import argparse
import asyncio
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Final

import uvloop
from pydantic import ValidationError

from dp_extproc.config import ConfigError, ListenSettings, Problem, Warn, ignore, parse_config, read_config
from dp_extproc.runtime.process import serve
from dp_extproc.runtime.secrets import external_problems
from dp_extproc.runtime.sockets import StartError, check_ports
from dp_extproc.runtime.worker_context import WorkerContext
from dp_extproc.runtime.workers import serve_with_workers

_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, required=True, help="configuration file")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes, in place of listen.workers, which envoy-config reads, too"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    # A parent process passes it to the worker processes that it starts.
    parser.add_argument("--worker-context", type=WorkerContext.parse, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        The exit status: 0 after a signal, 1 if the service cannot start, 2 if the file cannot be used.
    """
    context: WorkerContext | None = args.worker_context
    line = _FORMAT if context is None else f"{context}: {_FORMAT}"
    logging.basicConfig(level=args.log_level.upper(), stream=sys.stderr, format=line)
    for chatty in ("httpx", "uvicorn"):  # httpx logs every reading, uvicorn its own start
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _serve(args, context)
    except (ConfigError, StartError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _serve(args: argparse.Namespace, context: WorkerContext | None) -> None:
    """Check the configuration and the ports, then serve.

    Raises:
        ConfigError: The file, or a file or variable that it names, cannot be used.
        StartError: The service cannot listen.
    """
    text = read_config(args.config)
    # In a worker process the warnings are dropped: its parent has logged them.
    warn: Warn = partial(_log.warning, "%s: %s", args.config) if context is None else ignore
    config = parse_config(text, str(args.config), warn)
    if problems := external_problems(config):
        raise ConfigError(str(args.config), problems)
    if context is not None:
        uvloop.run(serve(config, text, args.config, context))
        return
    listen = with_workers(config.listen, args.workers)
    check_ports(listen)
    if listen.workers > 1:
        asyncio.run(serve_with_workers(listen.workers, config, text, args.config, args.log_level))
    else:
        uvloop.run(serve(config, text, args.config))


def with_workers(listen: ListenSettings, workers: int | None) -> ListenSettings:
    """Override ``listen.workers`` by the option, if it is given.

    Raises:
        ConfigError: The number does not fit the other settings.
    """
    if workers is None or workers == listen.workers:
        return listen
    addresses = {"grpc": listen.grpc, "admin": listen.admin, "advertise": listen.advertise}
    try:
        ListenSettings.model_validate({**addresses, "workers": workers})  # every setting that depends on the number
    except ValidationError as error:
        problems = [Problem(None, "", each["msg"].removeprefix("Value error, ")) for each in error.errors()]
        raise ConfigError("--workers", problems) from None
    _log.warning(
        "--workers %d wins over listen.workers: %d; write it into the file, too, for Envoy must know them all",
        workers,
        listen.workers,
    )
    return listen.model_copy(update={"workers": workers})
