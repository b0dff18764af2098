"""``dp-extproc envoy-config``: print the Envoy configuration that belongs to a configuration of the service."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from dp_extproc.cli import start
from dp_extproc.config import ConfigError, EnvoySettings, Protocol
from dp_extproc.config.listen import MAX_PORT
from dp_extproc.envoy_config import FORMS, secret_files
from dp_extproc.envoy_config.formats.target import ObjectName, Target, mismatch
from dp_extproc.envoy_config.forms import Files

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""Names of objects in Kubernetes (RFC 1123), which host names are as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start.add_arguments(parser)
    parser.add_argument(
        "--format", choices=FORMS, default="bootstrap", help="form of the configuration (%(default)s); see docs/mesh.md"
    )
    parser.add_argument(
        "--name-prefix", metavar="TEXT", help="beginning of all names of clusters and listeners (envoy.name_prefix)"
    )
    gateway = parser.add_argument_group("gateway", "what exists already, for the forms that need it; see docs/mesh.md")
    gateway.add_argument("--gateway", metavar="NAMESPACE/NAME", type=_object_name, help="the Gateway object")
    gateway.add_argument(
        "--listener",
        metavar="NAME",
        type=_name,
        action="append",
        default=[],
        help="one of its listeners; may be repeated",
    )
    gateway.add_argument("--port", metavar="N", type=_port, help="port of its listener")
    gateway.add_argument(
        "--hostname",
        metavar="HOST",
        type=_hostname,
        action="append",
        default=[],
        help="host of the requests; may be repeated",
    )
    gateway.add_argument(
        "--selector",
        metavar="LABEL=VALUE",
        type=_label,
        action="append",
        default=[],
        help="label of the gateway's pods; may be repeated",
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write files into this directory")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the internal listeners of the files in DIR, for streams in flight; see docs/mesh/envoy.md",
    )


def run(args: argparse.Namespace) -> int:
    """Print the configuration to stdout, or write its files.

    Returns:
        The exit status: 2 if the configuration cannot be used, 1 if a file cannot be written.
    """
    try:
        started = start.load(args, lambda line: sys.stderr.write(f"{line}\n"))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if started.config.protocol is Protocol.ENDPOINT_PICKER:
        sys.stderr.write(
            f"{started.source.name}: protocol: endpoint_picker is for a gateway that configures its own Envoy\n"
        )
        return 2
    config = started.config.model_copy(update={"listen": started.listen})
    if args.name_prefix is not None:
        try:
            prefix = EnvoySettings(name_prefix=args.name_prefix).name_prefix
        except ValidationError as error:
            sys.stderr.write(f"--name-prefix {args.name_prefix}: {error.errors()[0]['msg']}\n")
            return 2
        config = config.model_copy(update={"envoy": config.envoy.model_copy(update={"name_prefix": prefix})})
    form = FORMS[args.format]
    target = Target(args.gateway, tuple(args.hostname), args.port, tuple(args.listener), tuple(args.selector))
    if problem := mismatch(args.format, target, form.takes, form.needs):
        sys.stderr.write(f"{problem}\n")
        return 2
    if args.keep and (form.keep is None or args.output is None):
        sys.stderr.write("--keep is for files that Envoy reads again; add: --format xds -o DIR\n")
        return 2
    files = {**form.files(config, target), **secret_files(config)}
    if args.output is None:
        for number, (name, text) in enumerate(files.items()):
            sys.stdout.write(text if len(files) == 1 else f"{'---' if number else ''}\n# {name}\n{text}")
        return 0
    try:
        _write(args.output, files, form.keep if args.keep else None)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        sys.stderr.write(f"{args.output}: {reason}\n")
        return 1
    return 0


def _write(directory: Path, files: Files, keep: Callable[[Files, Files], Files] | None) -> None:
    """Write files in their order, each by rename, because Envoy may read them again at once.

    Raises:
        OSError: A file cannot be written, or an old one not be read.
        ValueError: An old file is not what *keep* expects.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if keep is not None:
        paths = {name: directory / name for name in files}
        files = keep({name: path.read_text("utf-8") for name, path in paths.items() if path.exists()}, files)
    for name, text in files.items():
        new = directory / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(directory / name)


def _object_name(text: str) -> ObjectName:
    match text.split("/"):
        case [namespace, name] if _NAME.fullmatch(namespace) and _NAME.fullmatch(name):
            return ObjectName(namespace, name)
    raise argparse.ArgumentTypeError(f"{text!r}: write namespace and name, such as default/eg")


def _name(text: str) -> str:
    if _NAME.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: write a name of Kubernetes, such as http")


def _label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if separator and name and value:
        return name, value
    raise argparse.ArgumentTypeError(f"{text!r}: write a label of the pods, such as istio=ingressgateway")


def _hostname(text: str) -> str:
    if _NAME.fullmatch(text.removeprefix("*.")):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: write a host name, such as llm.example.com or *.example.com")


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= MAX_PORT:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port; write a number from 1 to {MAX_PORT}")
