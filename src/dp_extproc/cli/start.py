"""What ``serve``, ``check`` and ``envoy-config`` start from: a configuration file, or engines by their URLs."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from dp_extproc.config import (
    Config,
    ConfigError,
    ConfigFile,
    ConfigSource,
    FixedText,
    Given,
    ListenSettings,
    Problem,
    configure,
    parse_config,
)

_VARIABLE: Final = "DP_EXTPROC_"
"""Beginning of the variables; the name of the option follows."""
_STANDARD_INPUT: Final = "-"
_LISTS: Final = ("prefill", "decode", "workers", "model")
_URLS: Final = _LISTS[:3]
_ADDRESSES: Final = ("listen", "admin", "envoy_listen")
_SEPARATOR: Final = re.compile(r"[\s,]+")
_NOTHING_GIVEN: Final = """\
is missing; give one of
    -c FILE                            a file (dp-extproc init writes one), or - for standard input
    --prefill URL... --decode URL...   engines of two roles
    --workers URL...                   engines that do both
  or the variables DP_EXTPROC_CONFIG, DP_EXTPROC_PREFILL and DP_EXTPROC_DECODE, or DP_EXTPROC_WORKERS"""

WarnLine = Callable[[str], object]
"""Called with a warning of one line."""


@dataclass(frozen=True, slots=True)
class Start:
    """A checked configuration, and where it came from."""

    source: ConfigSource
    text: str
    config: Config
    """The configuration in the text."""
    listen: ListenSettings
    """Its section ``listen``, with the number of processes that ``--processes`` gives."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="configuration file (YAML); - reads it from standard input"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="number of worker processes, in place of listen.workers; the same for serve and envoy-config",
    )
    urls = parser.add_argument_group(
        "without a file",
        f"Engines by their URLs. Each option may be a variable instead, such as {_VARIABLE}PREFILL, with a list "
        "separated by blanks or commas.",
    )
    for name, what in (
        ("prefill", "prefill engines: http://HOST:PORT each, or dns://NAME:PORT for all addresses of a name"),
        ("decode", "decode engines, likewise"),
        ("workers", "engines that do both, likewise"),
    ):
        urls.add_argument(f"--{name}", nargs="+", action="extend", metavar="URL", help=what)
    urls.add_argument("--model", nargs="+", action="extend", metavar="NAME", help="models that are served (any)")
    for name, what in (("listen", "gRPC for Envoy"), ("admin", "admin pages"), ("envoy-listen", "clients, by Envoy")):
        urls.add_argument(f"--{name}", metavar="IP:PORT", help=f"address for {what}")


def load(args: argparse.Namespace, warn: WarnLine, environment: Mapping[str, str] = os.environ) -> Start:
    """Read and check what the options and variables name.

    Raises:
        ConfigError: Nothing is named, or too much, or what is named cannot be used.
    """
    processes = _processes(args, warn)
    given = _given(args, environment)
    config_file = _config_file(args, given, warn, environment)
    if config_file is not None:
        source = _read_standard_input() if config_file == _STANDARD_INPUT else ConfigFile(Path(config_file))
        return of_source(source, processes, warn, environment)
    if not given.keys() & set(_URLS):
        raise ConfigError("configuration", [Problem(None, "", _NOTHING_GIVEN)])
    if processes is not None:
        given["processes"] = Given("--processes", (processes,))
    made = configure(given)
    try:
        return of_source(made.source, None, warn, environment)
    except ConfigError as error:
        raise ConfigError(made.source.name, list(made.renamed(error.problems))) from None


def of_source(
    source: ConfigSource, processes: int | None, warn: WarnLine, environment: Mapping[str, str] = os.environ
) -> Start:
    """Read and check one source.

    Raises:
        ConfigError: What it has cannot be used.
    """
    text = source.read()
    config = parse_config(text, source.name, lambda warning: warn(f"{source.name}: {warning}"), environment)
    return Start(source, text, config, with_processes(config.listen, processes, warn))


def _processes(args: argparse.Namespace, warn: WarnLine) -> int | None:
    """Return the number of processes. One bare number is the former meaning of ``--workers``, read until 1.0."""
    processes: int | None = args.processes
    if args.workers is None or len(args.workers) != 1 or not args.workers[0].isdecimal():
        return processes
    if processes is not None:
        message = "a number is the old name of --processes, which is given, too; keep --processes alone"
        raise ConfigError("command line", [Problem(None, f"--workers {args.workers[0]}", message)])
    processes, args.workers = int(args.workers[0]), None
    warn(f"--workers {processes}: was renamed; write --processes {processes} (the old name is read until version 1.0)")
    return processes


def _given(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Given]:
    """Collect what is given for a start without a file; an option wins over its variable."""
    found: dict[str, Given] = {}
    for name in (*_LISTS, *_ADDRESSES):
        value, variable = getattr(args, name), f"{_VARIABLE}{name.upper()}"
        if value is not None:
            found[name] = Given(f"--{name.replace('_', '-')}", tuple(value) if name in _LISTS else (value,))
        elif text := environment.get(variable, "").strip(" \t\r\n,"):
            found[name] = Given(variable, tuple(_SEPARATOR.split(text)) if name in _LISTS else (text,))
    return found


def _config_file(
    args: argparse.Namespace, given: Mapping[str, Given], warn: WarnLine, environment: Mapping[str, str]
) -> str | None:
    """Return the file to read; None for a start without one.

    Raises:
        ConfigError: A file and URLs are given, both by options or both by variables.
    """
    by_option = [each for each in given.values() if each.is_option]
    path: str | None = args.config
    place, rivals = "--config", by_option
    if path is None:
        path = environment.get(f"{_VARIABLE}CONFIG") or None
        place, rivals = f"{_VARIABLE}CONFIG", list(given.values())
        if path is not None and any(name in given and given[name].is_option for name in _URLS):
            warn(f"{place} is not used, since {by_option[0].place} is given")
            return None
    if path is None:
        return None
    if rivals:
        names = ", ".join(each.place for each in rivals)
        message = (
            f"is for a start without a file, and {place} names one; leave one of them out, or write it in the file"
        )
        raise ConfigError("command line", [Problem(None, names, message)])
    for each in given.values():
        warn(f"{each.place} is not used, since {place} names a configuration file")
    return path


def _read_standard_input() -> FixedText:
    try:
        return FixedText("standard input", sys.stdin.buffer.read().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("standard input", [Problem(None, "", f"cannot be read: {error}")]) from None


def with_processes(listen: ListenSettings, processes: int | None, warn: WarnLine) -> ListenSettings:
    """Override ``listen.workers`` by the option, if it is given.

    Raises:
        ConfigError: The number does not fit the other settings.
    """
    if processes is None or processes == listen.workers:
        return listen
    addresses = {"grpc": listen.grpc, "admin": listen.admin, "advertise": listen.advertise}
    try:
        ListenSettings.model_validate({**addresses, "workers": processes})  # every setting that depends on the number
    except ValidationError as error:
        problems = [Problem(None, "", each["msg"].removeprefix("Value error, ")) for each in error.errors()]
        raise ConfigError("--processes", problems) from None
    warn(
        f"--processes {processes} wins over listen.workers: {listen.workers}; write it into the file, too, for Envoy "
        "must know them all"
    )
    return listen.model_copy(update={"workers": processes})
